"""belle-run serve: the command line of the server, which is made from the records of its options."""

from __future__ import annotations

import difflib
import importlib
import signal
import sys
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import click

from belle_compile.runtime.distributed import ranks
from belle_compile.runtime.distributed.command import run_command
from belle_compile.runtime.engine import Engine
from belle_compile.runtime.errors import BelleError, EngineError
from belle_compile.runtime.server.options import STAGE, EngineOptions, ServerOptions, option_name
from belle_compile.runtime.server.toml import read_table

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
        params += [_click_option(option, hints[option.name]) for option in fields(record)]
    params += [
        click.Option(["--ranks"], type=int, metavar="N", help="Processes that run the engine.  [default: the engine's]"),
        click.Option(
            ["--rank-timeout"], type=float, default=ranks.TIMEOUT_S, envvar=ranks.TIMEOUT, metavar="S", show_default=True,
            help="Seconds to wait for a rank that does not start or answer.",
        ),
        click.Option(
            ["--config"], type=click.Path(path_type=Path), metavar="FILE", is_eager=True, expose_value=False,
            callback=_read_file, help="TOML file of options.",
        ),
    ]  # fmt: skip
    return click.Command(
        "serve", params=params, callback=_serve, help=_serve.__doc__, epilog=EPILOG,
        context_settings={
            "auto_envvar_prefix": ENVIRONMENT, "help_option_names": ["-h", "--help"], "max_content_width": 110,
        },
    )  # fmt: skip


def records(params: dict[str, Any]) -> tuple[ServerOptions, EngineOptions]:
    """Return the options that a command line was parsed to; raises `EngineError` for values that do not fit."""
    made: list[Any] = []
    for record in (ServerOptions, EngineOptions):
        made.append(record(**{option.name: params[_parameter(option)] for option in fields(record)}))
    server, engine = made
    return server, engine


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
    from belle_compile.runtime.server.access import Access
    from belle_compile.runtime.server.app import create_app
    from belle_compile.runtime.server.logs import configure
    from belle_compile.runtime.server.metrics import Metrics
    from belle_compile.runtime.server.serve import bind, check_certificate, run
    from belle_compile.runtime.server.service import Service

    options, engine_options = records(params)
    configure(options)
    # Mistakes that can be found are found before the engine is loaded, which may take minutes.
    check_certificate(options)
    Access(options.api_keys, options.api_key_file)
    place = ranks.place()
    sockets = bind(options) if place is None or place.rank == 0 else None
    metrics = Metrics()
    with Engine.load(directory, telemetry=metrics, **engine_options.arguments()) as engine:
        service = Service(engine, options, metrics, directory)
        try:
            return run(create_app(service), service, sockets)
        finally:
            service.close()


def _check_extra() -> None:
    """Raise `EngineError` where a package of the extra `serve` is missing."""
    for name in _EXTRA:
        try:
            importlib.import_module(name)
        except ImportError:
            what, remedy = "belle-run serve needs packages that are not installed", "pip install 'belle-compile[serve]'"
            raise EngineError("server", what, found=f"no {name}", remedy=remedy) from None


def _parameter(option: Field[Any]) -> str:
    """The name of an option among those that click parsed."""
    return option_name(option).replace("-", "_")


def _click_option(option: Field[Any], hint: Any) -> click.Option:
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


def _read_file(context: click.Context, parameter: click.Parameter, path: Path | None) -> None:
    """Let the values of a file be the defaults of what neither the command line nor the environment sets."""
    if path is None:
        return
    known = {_flag(option): option for option in context.command.params if isinstance(option, click.Option)}
    del known["config"]
    try:
        table = read_table(path, STAGE)
        for name, value in table.items():
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                remedy = f"did you mean {near[0]}?" if near else "belle-run serve --help shows all, without the dashes"
                raise EngineError(STAGE, f"unknown option in {path}", found=name, remedy=remedy.rstrip("?"))
            _check_type(name, value, known[name], path)
    except BelleError as error:
        raise click.UsageError(str(error), context) from None
    context.default_map = {str(known[name].name): value for name, value in table.items()}


def _flag(option: click.Option) -> str:
    return option.opts[0].lstrip("-")


def _check_type(name: str, value: Any, option: click.Option, path: Path) -> None:
    """Raise `EngineError` for a value of a file whose type is not the option's; click would take 8000.5 for a port."""
    kinds: Sequence[tuple[click.ParamType[Any], tuple[type, ...], str]] = (
        (click.BOOL, (bool,), "true or false"), (click.INT, (int,), "a whole number"), (click.FLOAT, (int, float), "a number"),
    )  # fmt: skip
    types, expected = next(((types, text) for kind, types, text in kinds if option.type is kind), ((str,), "text"))
    values = value if option.multiple and isinstance(value, list) else [value]
    if option.multiple:
        expected = f"a list of {expected}s"
    if not all(type(item) in types for item in values) or option.multiple != isinstance(value, list):
        found = type(value).__name__ if expected.endswith(("text", "texts")) else repr(value)
        raise EngineError(STAGE, f"{name} in {path}", found=found, expected=expected)
