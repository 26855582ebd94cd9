"""The group of all commands, its exit codes and its error messages."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NoReturn

import click

from belle_compile import __version__
from belle_compile.compiler.cli import terminal
from belle_compile.compiler.cli.build import build, repartition
from belle_compile.compiler.cli.calibration import calibrate_set
from belle_compile.compiler.cli.engines import edit, inspect, targets, verify
from belle_compile.compiler.cli.estimates import plan, sensitivity
from belle_compile.compiler.cli.export import export
from belle_compile.compiler.cli.progress import Run
from belle_compile.runtime.errors import BelleError
from belle_compile.runtime.options_file import config_option, name_variables
from belle_compile.runtime.standard_streams import standard_streams
from belle_compile.runtime.usage import asks_for_json, usage_error, usage_sentence, version_option


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name=terminal.NAME)
def cli() -> None:
    """Compile BELLE checkpoints (BLOOM and LLaMA families) to engines for CPUs and NVIDIA GPUs.

    \b
    Examples:
      belle-compile build /models/BELLE-7B-2M --target cpu -o artifacts/belle-7b-cpu
      belle-compile inspect artifacts/belle-7b-cpu
      belle-run artifacts/belle-7b-cpu "What is the capital of France?"

    A command that fails prints one sentence with the reason on stderr and exits with 1 (2 when the command line is wrong); with
    --json, also an object with the parts of the reason on stdout. Set BELLE_TRACEBACK=1 to see where in the code it failed.

    Each option can be set in the environment, as BELLE_BUILD_TARGET=cpux2, and in a TOML file, as target = "cpux2" (--config).
    The command line goes before the environment, and the environment before the file.
    """


def _explained(callback: Callable[..., Any]) -> Callable[..., Any]:
    """A command whose errors of files are sentences, so that those of the standard streams alone reach `standard_streams`."""

    @wraps(callback)
    def explained(*arguments: Any, **options: Any) -> Any:
        try:
            return callback(*arguments, **options)
        except OSError as error:
            if os.environ.get("BELLE_TRACEBACK"):
                raise
            raise terminal.as_belle_error(error) from error

    return explained


for _command in (build, calibrate_set, edit, export, inspect, plan, repartition, sensitivity, targets, verify):
    assert _command.callback is not None
    _command.callback = _explained(_command.callback)
    _command.params += [config_option("options"), version_option()]
    name_variables(_command, f"BELLE_{str(_command.name).replace('-', '_').upper()}")
    cli.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0, 1 with one sentence on stderr, 2 for wrong usage, 130 after Ctrl-C."""
    with standard_streams(terminal.NAME):
        sys.exit(_run(arguments, Run(as_json=asks_for_json(arguments))))


def _run(arguments: Sequence[str] | None, run: Run) -> int:
    """Run the command line and show its error; returns the exit code. Errors of the standard streams are raised."""
    try:
        return cli.main(args=arguments, prog_name=terminal.NAME, standalone_mode=False, obj=run) or 0
    except click.ClickException as error:
        terminal.show_error(usage_sentence(error, terminal.NAME), usage_error(error, terminal.NAME), run)
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        stage = f" in the stage {run.stages[-1].name} after {run.seconds:.1f} s" if run.stages else ""
        terminal.show_failure(BelleError("interrupted", f"stopped by Ctrl-C{stage}", remedy=run.on_interrupt()), run)
        return 130
    except Exception as error:
        if isinstance(error, OSError) or os.environ.get("BELLE_TRACEBACK"):
            raise
        terminal.show_failure(terminal.as_belle_error(error), run)
        return 1
