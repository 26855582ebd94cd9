"""What the command lines of both programs have in common: the sentence for a wrong one, and --version."""

from __future__ import annotations

import click

from belle_compile import __version__


def usage_sentence(error: click.ClickException, program: str) -> str:
    """What is wrong with the command line of `program`, and where its options are listed; the help itself where a group was
    called without a command."""
    message = error.format_message()
    context = getattr(error, "ctx", None)
    if context is not None and message == context.get_help():
        return message
    path: str = context.command_path if context is not None else program
    command = path.removeprefix(program).strip()
    return f"{program}: {command + ': ' if command else ''}{message.rstrip('.')}; see `{path} --help`."


def version_option() -> click.Option:
    """--version of a command below a program, which prints the version of the package and ends."""

    def show(context: click.Context, parameter: click.Parameter, given: bool) -> None:
        if given and not context.resilient_parsing:
            click.echo(f"{context.command_path}, version {__version__}")
            context.exit()

    return click.Option(
        ["--version"], is_flag=True, is_eager=True, expose_value=False, callback=show, help="Show the version and exit."
    )
