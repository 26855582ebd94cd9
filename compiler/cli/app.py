"""The group of all commands, its exit codes and its error messages."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from belle_compile import __version__
from belle_compile.compiler.cli.build import build, repartition
from belle_compile.compiler.cli.calibration import calibrate_set
from belle_compile.compiler.cli.engines import edit, inspect, targets, verify
from belle_compile.compiler.cli.estimates import plan, sensitivity
from belle_compile.runtime.errors import BelleError

_NAME = "belle-compile"


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name=_NAME)
def cli() -> None:
    """Compile BELLE checkpoints (BLOOM and LLaMA families) to engines for CPUs and NVIDIA GPUs.

    \b
    Examples:
      belle-compile build /models/BELLE-7B-2M --target cpu -o artifacts/belle-7b-cpu
      belle-compile inspect artifacts/belle-7b-cpu
      belle-run artifacts/belle-7b-cpu "What is the capital of France?"

    A command that fails prints one sentence with the reason on stderr and exits with 1 (2 when the command line is wrong). Set
    BELLE_TRACEBACK=1 to see where in the code it failed.
    """


for _command in (build, calibrate_set, edit, inspect, plan, repartition, sensitivity, targets, verify):
    cli.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0, 1 with one sentence on stderr, 2 for wrong usage, 130 after Ctrl-C."""
    try:
        sys.exit(cli.main(args=arguments, prog_name=_NAME, standalone_mode=False) or 0)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted.", 130)
    except Exception as error:
        if os.environ.get("BELLE_TRACEBACK"):
            raise
        _fail(_sentence(error), 1)


def _sentence(error: Exception) -> str:
    if isinstance(error, BelleError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] != "belle_compile":
        return f"build: the Python package {error.name} is not installed; run `pip install 'belle-compile[build]'`."
    if isinstance(error, MemoryError):
        return "memory: the host has too little of it for this checkpoint; free some or use a larger host."
    if isinstance(error, OSError):
        return f"file: {error.strerror or error}" + (f": {error.filename}" if error.filename else "") + "."
    return f"internal error: {type(error).__name__}: {error}; run again with BELLE_TRACEBACK=1 and report what it prints."


def _fail(sentence: str, status: int) -> NoReturn:
    click.echo(f"{_NAME}: {' '.join(sentence.split())}", err=True)
    sys.exit(status)
