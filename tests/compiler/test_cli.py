"""The command line: results on stdout, one sentence on stderr and an exit status when something does not fit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import click
import pytest

import belle_compile
from belle_compile.compiler import cli, driver, repartition, requests
from belle_compile.compiler.backends.base import registered, serving
from belle_compile.compiler.devices import DEVICES
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.gate import Gate
from belle_compile.compiler.reading import Reading
from belle_compile.compiler.requests import SelectOptions
from belle_compile.compiler.self_written import DEFAULT_WITHIN_S, SelfWritten
from belle_compile.passes.presets import DEFAULT_PRESET, METHODS, PRESETS
from belle_compile.runtime import artifact, host
from tests.compiler.engines import write_engine
from tests.runtime.fakes import make_directory

ROOT = Path(__file__).parents[2]


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    return write_engine(tmp_path / "engine")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Run the command in this process; return its exit status, stdout and stderr."""
    with pytest.raises(SystemExit) as end:
        cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


def fail(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that fails; return the one sentence that it prints."""
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (1, "")
    assert err.startswith("belle-compile: ") and err.endswith(".\n") and err.count("\n") == 1
    return err


def test_every_command_has_help_with_examples(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ([], *([name] for name in cli.cli.commands)):
        status, out, _ = run(capsys, *command, "--help")
        assert status == 0 and "Examples:" in out and f"belle-compile {' '.join(command)}" in out
    commands = [
        "build",
        "calibrate-set",
        "edit",
        "export",
        "inspect",
        "plan",
        "repartition",
        "sensitivity",
        "targets",
        "verify",
    ]
    assert sorted(cli.cli.commands) == commands


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version")[1] == f"belle-compile, version {belle_compile.__version__}\n"


def test_targets(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line.split() for line in run(capsys, "targets")[1].splitlines()]
    assert lines[0][:3] == ["device", "builds", "backends"] and lines[1][:2] == ["cpu", "now"]
    t4 = ["t4", "now", "tensorrt,", "onnxruntime", "15", "GiB", "320", "16", "30", "1-8", "7.5", "NVIDIA"]
    assert t4 in [line[:12] for line in lines]
    found = json.loads(run(capsys, "targets", "--json")[1])
    served = {name: [backend.name for backend in serving(device)] for name, device in DEVICES.items()}
    assert {device["name"]: device["backends"] for device in found["targets"]} == served
    assert [device["name"] for device in found["targets"] if device["builds"]] == [name for name in served if served[name]]
    assert served["cpu"][0] == "tvm" and served["h100"][0] == "triton" and served["t4"] == ["tensorrt", "onnxruntime"]
    assert found["aliases"] == {"a100": "a100-40g"}


def test_targets_lists_what_backends_and_formats_carry(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(run(capsys, "targets", "--backends", "--json")[1])
    assert [member["name"] for member in found["backends"]] == [backend.name for backend in registered()]
    formats = {member["name"]: member for member in found["formats"]}
    assert {name for name, reason in formats["gguf"]["presets"].items() if not reason} == {"int8", "int8-plain"}
    assert {name for name, reason in formats["safetensors"]["methods"].items() if not reason} == {
        "reorder", "smooth", "rotate",
    }  # fmt: skip
    assert formats["gguf"]["granularities"] == ["block", "channel"] and formats["safetensors"]["granularities"] == []
    text = run(capsys, "targets", "--backends")[1]
    assert "not rotate-online" in text and "which llama.cpp does not compute" in text
    assert "a scale for each block or channel of weights" in text


def test_inspect_says_what_the_engine_is(capsys: pytest.CaptureFixture[str], engine: Path) -> None:
    status, out, _ = run(capsys, "inspect", engine)
    assert status == 0
    for phrase in ("llama", "30 a step; 70 before fusion", "belle-llama", "not measured", "hidden_size 32", "fuse-add-norm"):
        assert phrase in out
    found = json.loads(run(capsys, "inspect", engine, "--json")[1])
    assert found["kernel_calls"] == {"before": 70, "after": 30}
    assert found["bytes"] == sum(found["bytes_by_part"].values())
    assert set(found["bytes_by_part"]) == {"weights", "kernels", "program", "tokenizer"}


def test_kernels_of_an_engine_that_lists_none(capsys: pytest.CaptureFixture[str], engine: Path) -> None:
    status, out, _ = run(capsys, "inspect", engine, "--kernels")
    assert status == 0 and out.split() == "kernels engines of the backend tvm have no list of their kernels".split()
    assert json.loads(run(capsys, "inspect", engine, "--kernels", "--json")[1]) == {"kernels": {}}


def test_names_that_are_nearly_right(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "buidl")[2].endswith("Did you mean 'build'? See `belle-compile --help`.\n")
    assert run(capsys, "build", "--trget", "cpu")[2].endswith("'--tune'?) See `belle-compile build --help`.\n")
    assert run(capsys, "build", "--xyzzy")[2].endswith("No such option '--xyzzy'; see `belle-compile build --help`.\n")


def test_inspect_of_something_else(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "is not an engine: found no manifest.json" in fail(capsys, "inspect", tmp_path)


def test_verify(capsys: pytest.CaptureFixture[str], engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "cpu_flags", lambda: host.ISA_FLAGS["avx2"])
    status, out, _ = run(capsys, "verify", engine)
    assert status == 0 and "all digests match" in out and "can run it, with avx2" in out
    assert json.loads(run(capsys, "verify", engine, "--json")[1])["isa"] == "avx2"


def test_verify_finds_a_changed_byte_of_the_weights(capsys: pytest.CaptureFixture[str], engine: Path) -> None:
    weights = engine / "rank0" / "weights.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    assert "digest of rank0/weights.safetensors" in fail(capsys, "verify", engine)


def test_verify_on_a_host_that_is_too_old(
    capsys: pytest.CaptureFixture[str], engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "cpu_flags", lambda: frozenset({"sse2"}))
    assert "this host cannot run the engine" in fail(capsys, "verify", engine)


def test_verify_of_an_engine_for_gpus_on_a_host_without_one(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = artifact.TargetInfo("a100-40g", "triton", ("sm_80",), artifact.Requirements("", ("sm_80",), 1 << 30))
    engine = make_directory(tmp_path / "engine", {"tokenizer.json": b"{}"}, target=target)

    def no_driver(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr("ctypes.CDLL", no_driver)
    error = fail(capsys, "verify", engine, "--quiet")
    assert "this host cannot run the engine built for a100-40g: found no NVIDIA driver on this host (no libcuda.so.1)" in error
    assert "expected an NVIDIA GPU and its driver; install NVIDIA's driver" in error


def test_build_refuses_an_unknown_target_before_anything_else(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "engine"
    assert "unknown target: found 'tpu', expected cpu" in fail(capsys, "build", "missing", "-o", out, "--target", "tpu")
    assert "does not build for it yet" in fail(capsys, "build", "missing", "-o", out, "--target", "a30x4")
    assert list(tmp_path.iterdir()) == []


def test_build_of_a_checkpoint_that_is_none(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert "belle-compile: checkpoint: " in fail(capsys, "build", tmp_path / "model", "-o", tmp_path / "engine")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_build_onto_something_that_exists(capsys: pytest.CaptureFixture[str], engine: Path) -> None:
    assert "exists already" in fail(capsys, "build", "missing", "-o", engine)
    (engine / "manifest.json").unlink()
    assert "--force replaces engine directories only" in fail(capsys, "build", "missing", "-o", engine, "--force")


@pytest.mark.parametrize(
    "arguments", [["build"], ["build", "x"], ["build", "x", "-o", "y", "--quant", "int3"], ["nothing"], ["inspect"], ["--oops"]]
)
def test_wrong_usage(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "") and err.startswith("belle-compile: ") and err.count("\n") == 1
    command = arguments[0] if arguments[0] in cli.cli.commands else ""
    assert err.endswith(f"see `belle-compile {command}".rstrip() + " --help`.\n")


@pytest.mark.parametrize(
    ("arguments", "what", "remedy"),
    [
        (["build", "--json"], "Missing argument 'CHECKPOINT'", "see `belle-compile build --help`"),
        (["inspect", "x", "--oops", "--json"], "No such option '--oops'", "see `belle-compile inspect --help`"),
        (["plan", "x", "--json", "--quant", "int3"], "Invalid value for '--quant': 'int3' is not one of", "plan --help`"),
        (["nothing", "--json"], "No such command 'nothing'", "see `belle-compile --help`"),
        (["build", "x", "-o", "y", "-v", "-q", "--json"], "--verbose and --quiet exclude each other", "build --help`"),
    ],
)
def test_wrong_usage_as_json(capsys: pytest.CaptureFixture[str], arguments: list[str], what: str, remedy: str) -> None:
    status, out, err = run(capsys, *arguments)
    error = json.loads(out)["error"]
    assert status == 2 and err == f"belle-compile: {error['message']}\n"
    assert error["stage"] == "usage" and error["what"].replace(": --oops", " '--oops'").startswith(what), error["what"]
    assert error["remedy"].endswith(remedy) and error["found"] == error["expected"] == ""


def test_wrong_options_in_files_as_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "options.toml"
    file.write_text("kernel = true\n")
    status, out, _ = run(capsys, "inspect", "x", "--config", file, "--json")
    error = json.loads(out)["error"]
    assert status == 2 and (error["stage"], error["found"], error["remedy"]) == ("options", "kernel", "did you mean kernels")
    file.write_text('json = true\nkernels = "all"\n')
    assert run(capsys, "inspect", "--config", file)[:2] == (2, ""), "a file that is wrong sets nothing"


def test_json_by_the_environment(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BELLE_INSPECT_JSON", "1")
    assert json.loads(run(capsys, "inspect")[1])["error"]["stage"] == "usage"
    assert json.loads(run(capsys, "inspect", "missing")[1])["error"]["stage"] == "engine"


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys)
    assert (status, out) == (2, "") and err.startswith("Usage: belle-compile") and "Examples:" in err


def test_what_is_shown_of_errors_as_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, out, err = run(capsys, "build", tmp_path / "missing", "-o", tmp_path / "new", "--json")
    found = json.loads(out)
    assert status == 1 and err == f"belle-compile: {found['error']['message']}\n"
    parts = {key: found["error"][key] for key in ("stage", "what", "found", "remedy")}
    path = f"path {tmp_path / 'missing'}"
    assert parts == {"stage": "checkpoint", "what": path, "found": "nothing there", "remedy": "check the path"}
    assert found["run"]["stages"] == [] and found["run"]["seconds"] >= 0


def test_the_json_of_a_build_that_fails_has_its_stages(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(request: driver.BuildRequest) -> None:
        request.on_progress("open", 0, 0)
        request.on_progress("digest", 3, 4)
        raise CompileError("digest", "a file", found="nothing")

    monkeypatch.setattr(driver, "build", build)
    status, out, _ = run(capsys, "build", tmp_path, "-o", tmp_path / "new", "--json")
    stages = json.loads(out)["run"]["stages"]
    assert status == 1 and [stage["stage"] for stage in stages] == ["open", "digest"]
    assert all(stage["seconds"] >= 0 and stage["peak_memory_bytes"] > 1 << 20 for stage in stages)


def test_an_engine_is_no_checkpoint(capsys: pytest.CaptureFixture[str], engine: Path, tmp_path: Path) -> None:
    for command in (["build", engine, "-o", tmp_path / "new"], ["plan", engine]):
        error = fail(capsys, *command)
        assert "found an engine directory, expected a checkpoint" in error and "belle-compile repartition" in error


def test_errors_of_any_kind_are_one_sentence(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from belle_compile.compiler import inspection

    for error, sentence in (
        (PermissionError(13, "Permission denied", "/models/x"), "file: Permission denied: /models/x."),
        (MemoryError(), "memory: the host has too little of it"),
        (RuntimeError("two\nlines"), "internal error: RuntimeError: two lines; run again with BELLE_TRACEBACK=1"),
        (ModuleNotFoundError("No module named 'torch'", name="torch.nn"), "run `pip install -c constraints.txt '.[build]'`."),
    ):

        def broken(path: Path, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(inspection, "inspect", broken)
        assert sentence in fail(capsys, "inspect", "x")
    monkeypatch.setenv("BELLE_TRACEBACK", "1")
    with pytest.raises(ModuleNotFoundError):
        cli.main(["inspect", "x"])


def test_interrupt(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from belle_compile.compiler import inspection

    def interrupted(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(inspection, "inspect", interrupted)
    status, out, err = run(capsys, "inspect", "x")
    assert (status, out, err.strip()) == (130, "", "belle-compile: interrupted: stopped by Ctrl-C."), "after ^C a new line"


# Runs a command as if only the runtime's dependencies were installed.
RUNTIME_ONLY = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        absent = "torch transformers onnx onnx_ir tvm gguf safetensors rich ml_dtypes rensa backports"
        if name.partition(".")[0] in absent.split():
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
from belle_compile.compiler.cli import main
main(sys.argv[1:])
"""


def run_runtime_only(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", RUNTIME_ONLY, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_without_the_build_extra_engines_can_be_inspected_and_builds_say_what_to_install(engine: Path) -> None:
    for command in (["inspect", engine], ["targets"]):
        done = run_runtime_only(*command)
        assert (done.returncode, done.stderr) == (0, "")
    done = run_runtime_only("verify", engine)
    assert done.returncode == 0 or "this host cannot run the engine" in done.stderr
    for command in ("build", "calibrate-set"):
        done = run_runtime_only(command, engine.parent, "-o", engine.parent / "new")
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr.startswith("belle-compile: build: the Python package ")
        assert done.stderr.endswith("is not installed; run `pip install -c constraints.txt '.[build]'`.\n")


def test_ctrl_c_in_a_build_exits_with_130_and_leaves_nothing(tmp_path: Path) -> None:
    script = """
        import signal, sys, time
        signal.signal(signal.SIGINT, signal.default_int_handler)
        from belle_compile.compiler import cli, driver
        def slow(*args, **kwargs):
            print("ready", flush=True)
            time.sleep(60)
        driver.open_checkpoint = slow
        cli.main(["build", ".", "-o", sys.argv[1]])
    """
    build = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "engine")], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert build.stdout is not None and build.stdout.readline() == "ready\n"
    assert len(os.listdir(tmp_path)) == 2
    build.send_signal(signal.SIGINT)
    _, err = build.communicate(timeout=20)
    assert build.returncode == 130
    acknowledged, end = filter(None, err.splitlines())
    assert acknowledged.startswith("belle-compile: Ctrl-C received in the stage open: stopping")
    assert end.startswith("belle-compile: interrupted: stopped by Ctrl-C in the stage open after ")
    assert end.endswith("; nothing is kept, since calibration had not finished a part.")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("command", ["build", "plan", "sensitivity"])
def test_quantizations_are_the_presets(command: str) -> None:
    quant = next(parameter for parameter in cli.cli.commands[command].params if parameter.name == "quantization")
    assert isinstance(quant.type, click.Choice)
    expected = [name for name, preset in PRESETS.items() if command != "sensitivity" or preset.recipe.quantizes]
    assert list(quant.type.choices) == expected and quant.default == DEFAULT_PRESET


def test_backends_are_those_of_the_registry(capsys: pytest.CaptureFixture[str]) -> None:
    names = [backend.name for backend in registered()]
    for command in ("build", "plan", "repartition"):
        assert f"--backend [{'|'.join(names)}]" in run(capsys, command, "--help")[1]
    status, _, err = run(capsys, "build", "x", "-o", "y", "--backend", "tpu")
    assert status == 2 and f"'tpu' is not one of {', '.join(map(repr, names))}" in err
    for arguments in (["build", ROOT, "-o", "y"], ["plan", ROOT]):
        assert "backend: backend for cpu: found triton, expected tvm" in fail(capsys, *arguments, "--backend", "triton")


def test_what_repartition_is_asked_for(
    capsys: pytest.CaptureFixture[str], engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[repartition.RepartitionRequest] = []

    def run_instead(request: repartition.RepartitionRequest) -> None:
        seen.append(replace(request, on_progress=print))
        raise CompileError("test", "seen")

    monkeypatch.setattr(repartition, "repartition", run_instead)
    new = engine.parent / "new"
    command = ("repartition", engine, "--target", "cpux2", "-o", new)
    fail(capsys, *command)
    assert seen.pop() == repartition.RepartitionRequest(engine, new, "cpux2", on_progress=print)
    fail(capsys, *command, "--backend", "tvm", "--force")
    assert (seen[0].backend, seen[0].force) == ("tvm", True)


def test_every_command_has_a_version(capsys: pytest.CaptureFixture[str]) -> None:
    for name in cli.cli.commands:
        assert run(capsys, name, "--version")[1] == f"belle-compile {name}, version {belle_compile.__version__}\n"


def test_options_from_the_environment_and_a_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[driver.BuildRequest] = []

    def build(request: driver.BuildRequest) -> None:
        seen.append(request)
        raise CompileError("test", "seen")

    monkeypatch.setattr(driver, "build", build)
    file = tmp_path / "build.toml"
    file.write_text('quant = "int8-accurate"\ntarget = "cpux2"\nisa = ["avx2"]\nno-gate = true\nquiet = true\n')
    command = "build", ROOT, "-o", tmp_path / "new", "--config", file
    fail(capsys, *command)
    assert (seen[-1].quantization, seen[-1].target, seen[-1].isas, seen[-1].gate) == ("int8-accurate", "cpux2", ("avx2",), None)
    monkeypatch.setenv("BELLE_BUILD_TARGET", "cpux4")
    monkeypatch.setenv("BELLE_BUILD_QUANT", "none")
    fail(capsys, *command)
    assert seen[-1].quantization == "none"
    fail(capsys, *command, "--quant", "int8")
    assert (seen[-1].quantization, seen[-1].target) == ("int8", "cpux4")
    file.write_text("size-budget = true\n")
    assert "size-budget in" in (error := run(capsys, *command)[2]) and "expected a number" in error


def test_help_of_build_names_every_preset_and_method(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(run(capsys, "build", "--help")[1].replace("-\n", "-").split())
    for name, preset in PRESETS.items():
        assert f"{name}: {preset.summary}." in text
    for name, method in METHODS.items():
        assert f"{name} ({method.summary})" in text


def test_defaults_of_build_are_those_of_a_request(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    seen: list[driver.BuildRequest] = []

    def build(request: driver.BuildRequest) -> None:
        seen.append(replace(request, on_progress=print, on_note=print))
        raise CompileError("test", "seen")

    monkeypatch.setattr(driver, "build", build)
    fail(capsys, "build", "tests", "-o", "engine-new")
    expected = driver.BuildRequest(Path("tests"), Path("engine-new"), on_progress=print, on_note=print)
    assert seen.pop() == replace(expected, calibration=SelfWritten(within_s=DEFAULT_WITHIN_S))
    fail(capsys, "build", "tests", "-o", "engine-new", "--no-calibration")
    assert seen.pop() == expected
    fail(capsys, "build", "tests", "-o", "engine-new", "--calibration", "self")
    assert seen.pop() == replace(expected, calibration=SelfWritten())
    status, _, err = run(capsys, "build", "tests", "-o", "engine-new", "--calibration", "self", "--no-calibration")
    assert status == 2 and "--calibration and --no-calibration exclude each other" in err
    arguments = "--methods", "rotate,smooth", "--calibration", "README.md", "--min-top1", "0.9", "--backend", "tvm"
    fail(capsys, "build", "tests", "-o", "engine-new", *arguments)
    given = {"methods": ("rotate", "smooth"), "gate": Gate(min_top1=0.9), "backend": "tvm", "calibration": Path("README.md")}
    assert seen.pop() == replace(expected, **given)
    keys = "--ignore-config-key", "a", "--ignore-config-key", "b", "--generation-defaults", "top_k=3", "--ignore-adapter"
    fail(capsys, "build", "tests", "-o", "engine-new", *keys)
    assert (seen[0].reading, seen.pop().generation) == (
        Reading(ignored_config_keys=("a", "b"), ignore_adapter=True),
        ("top_k=3",),
    )
    fail(capsys, "build", "tests", "-o", "engine-new", "--no-gate", "--methods", "none")
    assert (seen[0].gate, seen[0].methods) == (None, ())


def test_defaults_of_calibrate_set_are_those_of_its_options(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    selections: list[SelectOptions] = []

    def write_set(source: Path, output: Path, options: SelectOptions, **others: object) -> None:
        selections.append(options)
        raise CompileError("test", "seen")

    monkeypatch.setattr(requests, "write_set", write_set)
    fail(capsys, "calibrate-set", ROOT / "README.md", "-o", "set")
    assert selections == [SelectOptions()]
