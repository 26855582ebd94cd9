"""belle-run serve: where options come from, and what is refused before the engine is loaded."""

from __future__ import annotations

import gc
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from belle_compile.runtime.capacity.slo import Slo
from belle_compile.runtime.cli import main
from belle_compile.runtime.engine import Engine
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.server import serve
from belle_compile.runtime.server.options import EngineOptions, ServerOptions
from belle_compile.runtime.server.served_engine import ServedEngine
from belle_compile.runtime.server.service import Service
from tests.runtime.fakes import make_directory, make_engine
from tests.runtime.server.live import write


class Served:
    """What a run of the command would have served."""

    directory: Path
    load: dict[str, Any]
    options: ServerOptions
    service: Service


@pytest.fixture(name="served")
def _served(monkeypatch: pytest.MonkeyPatch) -> Served:
    served = Served()

    def load(directory: Path, **arguments: Any) -> Engine:
        served.directory, served.load = directory, arguments
        return make_engine()

    def run(app: Any, service: Service, sockets: Any) -> int:
        served.options, served.service = service.options, service
        for listener in sockets:
            listener.close()
        return 7

    monkeypatch.setattr(Engine, "load", load)
    monkeypatch.setattr(serve, "run", run)
    monkeypatch.setattr("belle_compile.runtime.server.logs.configure", lambda options: None)
    for name in ("BELLE_SERVE_PORT", "BELLE_SERVE_API_KEY", "BELLE_RANK_TIMEOUT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return served


def invoke(*arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(main, ["serve", "engine", "--port", "0", *arguments], env=environment)


def test_defaults(served: Served) -> None:
    result = invoke()
    assert result.exit_code == 7, result.output
    assert served.options == ServerOptions(port=0) and served.directory == Path("engine")
    del served.load["telemetry"]
    assert served.load == EngineOptions().arguments()


@pytest.mark.parametrize(("given", "changed"), [((), {"kv_cache_memory": 4096}), (("--kv-tokens", "64"), {"kv_tokens": 64})])
def test_another_engine_is_loaded_with_the_same_options(
    given: tuple[str, ...], changed: dict[str, int], served: Served
) -> None:
    assert invoke("--threads", "3", "--max-loras", "5", "--verify", *given).exit_code == 7
    first = served.load
    load = served.service.swap._load
    assert load is not None
    load(Path("next"), kv_cache_bytes=4096, max_loras=7)
    assert served.load == first | {"max_loras": 7, "lora": None} | changed and served.directory == Path("next")


def test_the_command_keeps_no_engine_that_was_replaced(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that stays reachable keeps some 40 MB of a tokenizer of 49,152 tokens."""
    alive: list[bool] = []

    def run(app: Any, service: Service, sockets: Any) -> int:
        for listener in sockets:
            listener.close()
        first = weakref.ref(service.engine)
        service.metrics.detach(service.engine)
        service.engine.close()
        service.swap.current = ServedEngine(make_engine(), service.options, None)
        gc.unfreeze()
        gc.collect()
        alive.append(first() is not None)
        return 7

    monkeypatch.setattr(serve, "run", run)
    assert invoke().exit_code == 7 and alive == [False]


def test_options_of_the_command_line(served: Served) -> None:
    result = invoke(
        "--served-model-name", "a", "--served-model-name", "b", "--api-key", "k", "--no-prefix-cache", "--kv-tokens", "64",
        "--result-cache", "none", "--drain-timeout", "3", "--log-format", "text", "--verify",
    )  # fmt: skip
    assert result.exit_code == 7, result.output
    options = served.options
    assert (options.served_model_names, options.api_keys, options.drain_timeout_s) == (("a", "b"), ("k",), 3.0)
    assert options.log_format == "text"
    assert (served.load["prefix_cache"], served.load["kv_tokens"], served.load["result_cache"]) == (False, 64, None)
    assert served.load["verify"] == "full"


def test_a_key_of_clients_is_refused_as_the_administrators_before_the_engine_is_loaded(served: Served) -> None:
    result = invoke("--api-key", "k", "--admin-key", "k")
    assert result.exit_code == 1 and "the key of 'admin': found another key with the same" in result.output
    assert not hasattr(served, "load")


def test_limits_of_latency(served: Served) -> None:
    result = invoke("--slo-ttft", "0.8", "--capacity", "c.json")
    assert result.exit_code == 7, result.output
    assert served.load["slo"] == Slo(0.8, None, Path("c.json"))
    result = invoke("--capacity", "c.json")
    assert result.exit_code == 1 and "capacity: found no limit, expected slo-ttft or slo-tpot too" in result.output


def test_the_command_line_goes_before_the_environment_and_that_before_the_file(served: Served, tmp_path: Path) -> None:
    text = 'max-queue = 1\nmax-num-seqs = 1\nthreads = 1\napi-key = ["f1", "f2"]\nlog-prompts = true\ndrain-timeout = 2\n'
    path = write(tmp_path / "serve.toml", text)
    result = invoke(
        "--config", str(path), "--threads", "3", BELLE_SERVE_THREADS="2", BELLE_SERVE_MAX_QUEUE="2", BELLE_SERVE_ACCESS_LOG="0"
    )
    assert result.exit_code == 7, result.output
    load = served.load
    assert (load["threads"], load["max_queue"], load["max_num_seqs"]) == (3, 2, 1)
    assert served.options.api_keys == ("f1", "f2") and served.options.log_prompts and not served.options.access_log
    assert served.options.drain_timeout_s == 2.0


def test_the_file_and_several_values_from_the_environment(served: Served, tmp_path: Path) -> None:
    path = write(tmp_path / "serve.toml", "access-log = false")
    assert invoke(BELLE_SERVE_CONFIG=str(path), BELLE_SERVE_API_KEY="k1 k2").exit_code == 7
    assert served.options.api_keys == ("k1", "k2") and not served.options.access_log


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot = 1", "unknown option in {path}: found prot; did you mean port."),
        ("engine = 'x'", "unknown option in {path}: found engine"),
        ("config = 'x'", "unknown option in {path}: found config"),
        ("port = '8000'", "port in {path}: found '8000', expected a whole number."),
        ("port = 8000.5", "port in {path}: found 8000.5, expected a whole number."),
        ("port = true", "port in {path}: found True, expected a whole number."),
        ("drain-timeout = '3'", "drain-timeout in {path}: found '3', expected a number."),
        ("verify = 1", "verify in {path}: found 1, expected true or false."),
        ("host = 1", "host in {path}: found int, expected text."),
        ("api-key = 'k'", "api-key in {path}: found str, expected a list of texts."),
        ("api-key = [1]", "api-key in {path}: found list, expected a list of texts."),
        ("port =", "cannot read {path}: found"),
    ],
)
def test_files_that_do_not_fit_are_refused(text: str, message: str, served: Served, tmp_path: Path) -> None:
    path = write(tmp_path / "serve.toml", text)
    result = invoke("--config", str(path))
    assert result.exit_code == 2 and message.format(path=path).removesuffix(".") in result.output, result.output
    assert not hasattr(served, "load")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--prot", "1"), 2, "No such option '--prot'"),
        (("--log-format", "xml"), 2, "'xml' is not one of"),
        (("--drain-timeout", "-1"), 1, "server options: drain-timeout: found -1.0, expected 0 or more."),
        (
            ("--kv-tokens", "64", "--kv-cache-memory", "0.5"),
            1,
            "the size of the KV cache: found kv_tokens and kv_cache_memory, expected one of them.",
        ),
        (("--result-cache", "disk"), 1, "result cache: store: found 'disk', expected one of memory"),
        (("--api-key-file", "absent.toml"), 1, "API keys: cannot read absent.toml: found"),
        (("--ssl-certfile", "absent.pem"), 1, "server: cannot load absent.pem"),
        (("--host", "no.such.host.invalid"), 1, "cannot listen on 'no.such.host.invalid'"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_engine_is_loaded(
    arguments: tuple[str, ...], code: int, message: str, served: Served
) -> None:
    result = invoke(*arguments)
    assert result.exit_code == code and message in result.output, result.output
    assert not hasattr(served, "load")


def test_a_missing_package_is_one_sentence(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    result = invoke()
    assert result.exit_code == 1
    assert result.output == (
        "belle-run: server: belle-run serve needs packages that are not installed: found no uvicorn; "
        "pip install -c constraints.txt '.[serve]'.\n"
    )


def test_an_engine_that_cannot_be_loaded(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(directory: Path, **arguments: Any) -> Engine:
        raise EngineError("engine", "it is damaged")

    monkeypatch.setattr(Engine, "load", load)
    result = invoke()
    assert result.exit_code == 1 and result.output == "belle-run: engine: it is damaged.\n"


def test_a_directory_named_serve_is_reachable(served: Served, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    make_directory(tmp_path / "serve", {"tokenizer.json": b"{}"})
    result = CliRunner().invoke(main, ["./serve", "--json", "hello"])
    assert result.exit_code == 0, result.output
    assert served.directory == Path("serve") and '"token_ids"' in result.output


def test_help_names_every_option() -> None:
    result = CliRunner().invoke(main, ["serve", "--help"], prog_name="belle-run")
    assert result.exit_code == 0 and result.output.startswith("Usage: belle-run serve [OPTIONS] ENGINE")
    for name in ("--api-key-file", "--kv-cache-memory", "--no-prefix-cache", "--ranks", "--config", "BELLE_SERVE_"):
        assert name in result.output
    assert "serve" in CliRunner().invoke(main, ["--help"]).output
