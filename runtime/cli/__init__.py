"""belle-run: answers prompts on the command line, one, a chat or a file of them, and serves engines.

Modules that import NumPy or tokenizers are imported when a command runs, once its arguments are known to be right.
"""

from belle_compile.runtime.cli.app import main

__all__ = ["main"]
