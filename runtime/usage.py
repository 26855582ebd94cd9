"""What the command lines of both programs have in common: errors as sentences and as JSON, and --version."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import click

from belle_compile import __version__
from belle_compile.runtime.errors import PROGRAM, BelleError

_JSON = "--json"


@dataclass
class Output:
    """What a command line prints, as far as it was parsed; the object of its context."""

    as_json: bool = False


def json_option(help: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """--json, passed as `as_json` and noted in the context's `Output` before other options are parsed, whose errors are JSON
    then."""

    def note(context: click.Context, parameter: click.Parameter, value: bool) -> bool:
        context.ensure_object(Output).as_json |= value
        return value

    return click.option(_JSON, "as_json", is_flag=True, is_eager=True, callback=note, help=help)


def asks_for_json(arguments: Sequence[str] | None) -> bool:
    """Whether a command line (None: this process's), which need not be right, asks for JSON."""
    words = sys.argv[1:] if arguments is None else arguments
    return _JSON in takewhile(lambda word: word != "--", words)


def show_error(error: BelleError, as_json: bool) -> None:
    """Print an error of belle-run on stderr, in one sentence; with `as_json` also an object with its parts on stdout."""
    click.echo(f"{PROGRAM}: {error}", err=True)
    if as_json:
        show_json(error.to_plain())


def show_json(parts: Mapping[str, str]) -> None:
    """Print the parts of an error as one line of JSON."""
    click.echo(json.dumps({"error": parts}, ensure_ascii=False))


def usage_error(error: click.ClickException, program: str) -> dict[str, str]:
    """The parts of an error about the command line of `program` for JSON, in the form of `BelleError.to_plain`."""
    message = usage_sentence(error, program).removeprefix(f"{program}: ")
    if isinstance(error.__cause__, BelleError):
        return error.__cause__.to_plain() | {"message": message}
    context = getattr(error, "ctx", None)
    remedy = f"see `{context.command_path if context is not None else program} --help`"
    return BelleError("usage", error.format_message().rstrip("."), remedy=remedy).to_plain() | {"message": message}


def usage_sentence(error: click.ClickException, program: str) -> str:
    """What is wrong with the command line of `program`, and where its options are listed; the help itself where a group was
    called without a command."""
    message = error.format_message()
    context = getattr(error, "ctx", None)
    if context is not None and message == context.get_help():
        return message
    path: str = context.command_path if context is not None else program
    command = path.removeprefix(program).strip()
    link = " See" if message.rstrip(")").endswith("?") else "; see"
    return f"{program}: {command + ': ' if command else ''}{message.rstrip('.')}{link} `{path} --help`."


def version_option() -> click.Option:
    """--version of a command below a program, which prints the version of the package and ends."""

    def show(context: click.Context, parameter: click.Parameter, given: bool) -> None:
        if given and not context.resilient_parsing:
            click.echo(f"{context.command_path}, version {__version__}")
            context.exit()

    return click.Option(
        ["--version"], is_flag=True, is_eager=True, expose_value=False, callback=show, help="Show the version and exit."
    )
