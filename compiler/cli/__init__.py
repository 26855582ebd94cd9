"""The command `belle-compile`: click commands, one file for each group of commands.

A command turns options into one call of the compiler and prints the result. Modules that need more than click are imported
when a command runs, so that `--help` and `--version` answer at once.
"""

from belle_compile.compiler.cli.app import cli, main

__all__ = ["cli", "main"]
