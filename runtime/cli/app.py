"""The command `belle-run` and its subcommands, its exit codes and its error messages."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from belle_compile import __version__
from belle_compile.runtime.cli import options
from belle_compile.runtime.distributed import ranks
from belle_compile.runtime.errors import PROGRAM, BelleError
from belle_compile.runtime.options_file import config_option, name_variables
from belle_compile.runtime.standard_streams import input_error, is_of_output, standard_streams
from belle_compile.runtime.usage import Output, asks_for_json, json_option, show_error, show_json, usage_error, usage_sentence

EXAMPLES = """
\b
Examples:
  belle-run artifacts/belle-7b-cpu "写一首关于春天的诗"
  belle-run artifacts/belle-7b-cpu                        chat; /help shows its commands
  belle-run artifacts/belle-7b-cpu -f question.txt        the file is one prompt; - is all of stdin
  belle-run artifacts/belle-7b-cpu --temperature 0 --json "1+1=?"
  belle-run artifacts/belle-7b-cpu --profile "你好"         shows where the time went
  belle-run artifacts/belle-7b-cpu < questions.txt        each line is a turn of one chat
  belle-run artifacts/belle-7b-cpu --self-test            checks that this host answers as the build did
  belle-run batch artifacts/belle-7b-cpu in.jsonl -o out.jsonl
  belle-run benchmark artifacts/belle-7b-cpu              measures what it serves on this host
  belle-run serve artifacts/belle-7b-cpu                  serves it over HTTP; see belle-run serve --help
  belle-run scale-out artifacts/belle-7b-cpu --replicas 2 serves it by several processes behind Ray Serve

\b
Each option can be set in the environment, as BELLE_RUN_TEMPERATURE=0, and in a TOML file, as temperature = 0 (--config).
"""
# The modules of the subcommands, imported when one is called; each has a function `command`.
SUBCOMMANDS: Mapping[str, str] = {
    "batch": "belle_compile.runtime.cli.batch",
    "benchmark": "belle_compile.runtime.cli.benchmark",
    "scale-out": "belle_compile.runtime.scale_out.cli",
    "serve": "belle_compile.runtime.server.cli",
}


class _Command(click.Command):
    """The command and its subcommands. An engine directory of such a name is ./serve."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        if not args or args[0] not in SUBCOMMANDS:
            return super().make_context(info_name, args, parent, **extra)
        subcommand: click.Command = importlib.import_module(SUBCOMMANDS[args[0]]).command()
        return subcommand.make_context(f"{info_name} {args[0]}", args[1:], parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        return super().invoke(ctx) if ctx.command is self else ctx.command.invoke(ctx)

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, *_: Any, **extra: Any) -> NoReturn:
        """Run the command line and exit: 1 with one sentence on stderr, 2 for wrong usage, 130 after Ctrl-C."""
        extra.pop("standalone_mode", None)
        output = Output(asks_for_json(args))
        with standard_streams(PROGRAM):
            try:
                sys.exit(super().main(args, PROGRAM, standalone_mode=False, obj=output, **extra) or 0)
            except click.ClickException as error:
                click.echo(usage_sentence(error, PROGRAM), err=True)
                if output.as_json:
                    show_json(usage_error(error, PROGRAM))
                sys.exit(error.exit_code)
            except (click.Abort, KeyboardInterrupt):
                if output.as_json:
                    show_json(BelleError("interrupted", "stopped by Ctrl-C").to_plain())
                sys.exit(130)
            except Exception as error:
                if is_of_output(error) or os.environ.get("BELLE_TRACEBACK") or ranks.place() is not None:
                    raise
                show_error(_as_belle_error(error), output.as_json)
                sys.exit(1)


def _as_belle_error(error: Exception) -> BelleError:
    """The error as one sentence that says what to do."""
    if isinstance(error, BelleError):
        return error
    if isinstance(error, UnicodeDecodeError):
        return input_error(error)
    remedy = "run again with BELLE_TRACEBACK=1 and report what it prints"
    return BelleError("internal error", f"{type(error).__name__}: {error}", remedy=remedy)


@click.command(
    PROGRAM,
    cls=_Command,
    epilog=EXAMPLES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, prog_name=PROGRAM)
@options.engine
@click.argument("prompt", required=False)
@click.option(
    "-f", "--file", type=click.Path(path_type=Path), metavar="FILE", help="Take the whole content of FILE as the prompt."
)
@options.system
@options.sampling
@click.option("--logprobs", type=int, metavar="N", help="With --json: log probabilities, and N alternatives a token.")
@options.encoding
@json_option("Print one JSON object per answer instead of streaming it, and one with the error of a command that fails.")
@click.option("--profile", is_flag=True, help="Show on stderr where the time went; with --json, in the object.")
@options.loading
@click.option("--self-test", is_flag=True, help="Check that this host gives the golden answers of the build, and do no more.")
def main(engine: Path, prompt: str | None, **given: Any) -> None:
    """Answer PROMPT with the engine in directory ENGINE, or chat when no PROMPT is given. The PROMPT - is all of stdin.

    What is not set here comes from the engine's generation defaults.
    """
    if given["logprobs"] is not None and not given["as_json"]:
        raise click.UsageError("--logprobs needs --json")
    if given["self_test"] and (prompt is not None or given["file"] is not None):
        raise click.UsageError("--self-test answers the engine's own prompts, so give no PROMPT")
    if prompt is not None and given["file"] is not None:
        raise click.UsageError("give either PROMPT or --file")
    if given["system"] is not None and given["raw"]:
        raise click.UsageError("--system is a message of a chat, and --raw has none")
    options.check_engine(engine)
    from belle_compile.runtime.cli.answers import answer
    from belle_compile.runtime.distributed.command import run_command

    code = run_command(
        engine,
        lambda: answer(engine, prompt, given),
        ranks_requested=given["count"],
        rank_timeout_s=given["rank_timeout"],
        as_json=given["as_json"],
    )
    sys.exit(code)


main.params.append(config_option("options"))
name_variables(main, "BELLE_RUN")
