"""Options of commands in the environment and in a TOML file (--config): the command line goes before the environment, and the
environment before the file. All three call an option by its long name."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from belle_compile.runtime.errors import BelleError, EngineError
from belle_compile.runtime.toml import read_table

_NAME = "config"


def config_option(stage: str) -> click.Option:
    """The option --config of a command; errors about the file are those of `stage`."""
    return click.Option(
        [f"--{_NAME}"], type=click.Path(path_type=Path), metavar="FILE", is_eager=True, expose_value=False,
        callback=lambda context, parameter, path: _read_file(context, path, stage), help="TOML file of options.",
    )  # fmt: skip


def name_variables(command: click.Command, prefix: str) -> None:
    """Let each option of a command be set by the environment variable `prefix`_ and its long name: `BELLE_BUILD_QUANT` for
    --quant. Variables that an option has of its own go before it.

    Click would name them after the parameters that a command's function has, which no user sees.
    """
    for option in command.params:
        if isinstance(option, click.Option) and option.allow_from_autoenv:
            own = [option.envvar] if isinstance(option.envvar, str) else list(option.envvar or ())
            option.envvar = [*own, f"{prefix}_{_flag(option).replace('-', '_').upper()}"]


def _read_file(context: click.Context, path: Path | None, stage: str) -> None:
    """Let the values of a file be the defaults of what neither the command line nor the environment sets."""
    if path is None:
        return
    known = {_flag(option): option for option in context.command.params if isinstance(option, click.Option)}
    del known[_NAME]
    try:
        table = read_table(path, stage)
        for name, value in table.items():
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                remedy = f"did you mean {near[0]}?" if near else f"{context.command_path} --help shows all, without the dashes"
                raise EngineError(stage, f"unknown option in {path}", found=name, remedy=remedy.rstrip("?"))
            _check_type(name, value, known[name], path, stage)
    except BelleError as error:
        raise click.UsageError(str(error), context) from error
    context.default_map = {str(known[name].name): value for name, value in table.items()}


def _flag(option: click.Option) -> str:
    """The long name of an option, without its dashes."""
    return max(option.opts, key=len).lstrip("-")


def _check_type(name: str, value: Any, option: click.Option, path: Path, stage: str) -> None:
    """Raise `EngineError` for a value of a file whose type is not the option's; click would take 8000.5 for a port."""
    kinds: Sequence[tuple[type[click.ParamType[Any]], tuple[type, ...], str]] = (
        (click.types.BoolParamType, (bool,), "true or false"), (type(click.INT), (int,), "a whole number"),
        (type(click.FLOAT), (int, float), "a number"),
    )  # fmt: skip
    types, expected = next(((types, text) for kind, types, text in kinds if isinstance(option.type, kind)), ((str,), "text"))
    values = value if option.multiple and isinstance(value, list) else [value]
    if option.multiple:
        expected = f"a list of {expected}s"
    if not all(type(item) in types for item in values) or option.multiple != isinstance(value, list):
        found = type(value).__name__ if expected.endswith(("text", "texts")) else repr(value)
        raise EngineError(stage, f"{name} in {path}", found=found, expected=expected)
