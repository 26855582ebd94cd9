"""The output of commands: JSON or aligned text on stdout, one sentence on stderr where something does not fit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import click

from belle_compile.compiler.cli.progress import Run
from belle_compile.compiler.tables import table
from belle_compile.runtime.errors import BelleError, install
from belle_compile.runtime.standard_streams import standard_streams

NAME = "belle-compile"


def show(result: Mapping[str, Any], rows: Sequence[tuple[str, str]], as_json: bool) -> None:
    """Print a command's result: the object as JSON, or its rows as a table."""
    write(to_json(result) if as_json else table(rows))


def write(text: str) -> None:
    """Print a text on stdout; where that fails, the command ends with a sentence about the output, not about a file."""
    with standard_streams(NAME):
        click.echo(text)


def to_json(result: Mapping[str, Any]) -> str:
    return json.dumps(result, indent=2, sort_keys=True, ensure_ascii=False)


def show_failure(error: BelleError, run: Run) -> None:
    """Print an error, see `show_error`."""
    show_error(f"{NAME}: {' '.join(str(error).split())}", error.to_plain(), run)


def show_error(sentence: str, parts: Mapping[str, str], run: Run) -> None:
    """Print an error's sentence on stderr; with --json also an object with its parts and the stages so far on stdout."""
    click.echo(sentence, err=True)
    if run.as_json:
        click.echo(to_json({"error": parts, "run": run.to_plain()}))


def as_belle_error(error: Exception) -> BelleError:
    """The error as one sentence that says what to do."""
    if isinstance(error, BelleError):
        return error
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] != "belle_compile":
        return BelleError("build", f"the Python package {error.name} is not installed", remedy=f"run `{install('build')}`")
    if isinstance(error, MemoryError):
        remedy = "free some or use a larger host"
        return BelleError("memory", "the host has too little of it for this checkpoint", remedy=remedy)
    if isinstance(error, OSError):
        return BelleError("file", f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""))
    remedy = "run again with BELLE_TRACEBACK=1 and report what it prints"
    return BelleError("internal error", f"{type(error).__name__}: {error}", remedy=remedy)
