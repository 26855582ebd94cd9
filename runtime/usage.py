"""The sentence for a command line that is wrong, for both programs."""

from __future__ import annotations

import click


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
