"""belle-run serve: the command line of the server, which is made from the records of its options."""

from __future__ import annotations

import gc
import importlib
import signal
import sys
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import click

from belle_compile.runtime.distributed import ranks
from belle_compile.runtime.distributed.command import run_command
from belle_compile.runtime.engine import Engine
from belle_compile.runtime.errors import EngineError, install
from belle_compile.runtime.options_file import config_option, name_variables
from belle_compile.runtime.server.options import STAGE, EngineOptions, ServerOptions, option_name
from belle_compile.runtime.serving.adapters import MORE_SLOTS
from belle_compile.runtime.usage import version_option

T = TypeVar("T")
ENVIRONMENT = "BELLE_SERVE"  # what the names of environment variables begin with
_EXTRA = ("fastapi", "httptools", "llguidance", "prometheus_client", "pydantic", "uvicorn", "uvloop")
_SIGNALS = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
_SIMPLE: dict[Any, click.ParamType[Any]] = {int: click.INT, float: click.FLOAT, str: click.STRING, bool: click.BOOL,
                                       Path: click.Path(path_type=Path)}  # fmt: skip

EPILOG = f"""
\b
Each option can be set in the environment, as {ENVIRONMENT}_MAX_QUEUE=64, and in a TOML file, as max-queue = 64.
The command line goes before the environment, and the environment before the file.
\b
Examples:
  belle-run serve artifacts/belle-7b-cpu --port 8080 --api-key "$KEY"
  belle-run serve artifacts/belle-7b-cpu --config /etc/belle/serve.toml
"""


def command() -> click.Command:
    """The command `belle-run serve`."""
    params: list[click.Parameter] = [click.Argument(["engine"], type=click.Path(path_type=Path))]
    for record in (ServerOptions, EngineOptions):
        hints = get_type_hints(record)
        params += [click_option(option, hints[option.name]) for option in fields(record)]
    params += [
        click.Option(["--ranks"], type=int, metavar="N", help="Processes that run the engine.  [default: the engine's]"),
        click.Option(
            ["--rank-timeout"], type=float, default=ranks.TIMEOUT_S, envvar=ranks.TIMEOUT, metavar="S", show_default=True,
            help="Seconds to wait for a rank that does not start or answer.",
        ),
        config_option(STAGE),
        version_option(),
    ]  # fmt: skip
    serve = click.Command(
        "serve", params=params, callback=_serve, help=_serve.__doc__, epilog=EPILOG,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    )  # fmt: skip
    name_variables(serve, ENVIRONMENT)
    return serve


def records(params: dict[str, Any]) -> tuple[ServerOptions, EngineOptions]:
    """Return the options that a command line was parsed to; raises `EngineError` for values that do not fit."""
    return record_of(ServerOptions, params), record_of(EngineOptions, params)


def record_of(record: type[T], params: dict[str, Any]) -> T:
    """Return one record of the options that a command line was parsed to."""
    declared: Any = fields(record)  # type: ignore[arg-type]
    return record(**{option.name: params[_parameter(option)] for option in declared})


def _serve(engine: Path, ranks: int | None, rank_timeout: float, **params: Any) -> None:
    """Serve the engine in directory ENGINE over HTTP, by OpenAI's API.

    It ends by SIGTERM or SIGINT, once the requests under way have ended; a second signal ends it at once.
    """
    code = run_command(
        engine,
        lambda: _serve_rank(engine, params),
        ranks_requested=ranks,
        rank_timeout_s=rank_timeout,
        handled_signals=_SIGNALS,
    )
    sys.exit(code)


def _serve_rank(directory: Path, params: dict[str, Any]) -> int:
    """Serve until a signal; in a rank other than 0, run its share of the steps until then."""
    _check_extra()
    from belle_compile.runtime.memory import share_heap
    from belle_compile.runtime.server.access import Access
    from belle_compile.runtime.server.app import create_app
    from belle_compile.runtime.server.logs import configure
    from belle_compile.runtime.server.metrics import Metrics
    from belle_compile.runtime.server.serve import bind, check_certificate, run
    from belle_compile.runtime.server.service import Service

    options, engine_options = records(params)
    configure(options)
    share_heap()  # engines are loaded on one thread after the other
    # Mistakes that can be found are found before the engine is loaded, which may take minutes.
    check_certificate(options)
    Access(options.api_keys, options.api_key_file, options.admin_key)
    place = ranks.place()
    sockets = bind(options) if place is None or place.rank == 0 else None
    metrics = Metrics()
    arguments = engine_options.arguments()
    if options.allow_lora_updates and engine_options.max_loras is None:
        arguments["max_loras"] = len(engine_options.lora) + MORE_SLOTS

    def load(directory: Path, *, kv_cache_bytes: int, max_loras: int | None) -> Engine:
        changed = {"lora": None, "max_loras": max_loras}
        if engine_options.kv_tokens is None:
            changed["kv_cache_memory"] = kv_cache_bytes
        return Engine.load(directory, telemetry=metrics, **arguments | changed)

    engine = Engine.load(directory, telemetry=metrics, **arguments)
    try:
        service = Service(engine, options, metrics, directory, load if place is None else None)
    except BaseException:
        engine.close()
        raise
    del engine  # The service has it, so that nothing keeps its memory once another one has replaced it.
    try:
        app = create_app(service)
        # What is here now lives as long as the process. Collecting garbage, which stops all threads, would go through it
        # again and again: a hundred thousand objects, some tens of milliseconds.
        gc.collect()
        gc.freeze()
        return run(app, service, sockets)
    finally:
        try:
            service.close()
        finally:
            service.swap.close()


def _check_extra() -> None:
    """Raise `EngineError` where a package of the extra `serve` is missing."""
    for name in _EXTRA:
        try:
            importlib.import_module(name)
        except ImportError:
            what, remedy = "belle-run serve needs packages that are not installed", install("serve")
            raise EngineError("server", what, found=f"no {name}", remedy=remedy) from None


def _parameter(option: Field[Any]) -> str:
    """The name of an option among those that click parsed."""
    return option_name(option).replace("-", "_")


def click_option(option: Field[Any], hint: Any) -> click.Option:
    """The option of a command line for a field that was made by `options.option`."""
    name, kind = option_name(option), _kind(hint)
    multiple = get_origin(hint) is tuple
    declaration = f"--{name}/--no-{name}" if kind is click.BOOL else f"--{name}"
    assert option.default is not MISSING, "every option has a default"
    return click.Option(
        [declaration], type=kind, multiple=multiple, default=option.default, help=option.metadata["help"],
        metavar=option.metadata["metavar"] or None, show_default=option.default not in (None, (), "", False),
    )  # fmt: skip


def _kind(hint: Any) -> click.ParamType[Any]:
    """The type of an option's values on the command line."""
    if get_origin(hint) is Literal:
        return click.Choice(get_args(hint))
    if get_origin(hint) is tuple:
        return _kind(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return _kind(next(part for part in get_args(hint) if part is not type(None)))
    return _SIMPLE[hint]
