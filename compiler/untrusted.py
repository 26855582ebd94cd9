"""Read files that may be damaged or hostile: sizes are checked before memory is allocated, and exceptions become sentences."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.stored_path import StoredPath
from belle_compile.runtime.errors import BelleError
from belle_compile.runtime.schema import parse_json

# Bounds of a JSON text, by the characters that a decoded object costs memory for: (character, most, what it counts). Gemma's
# tokenizer.json, the largest of a public language model, has 320,000 keys, 520,000 lists and 1,600,000 values.
_MOST_IN_JSON = (
    (b":", 1 << 19, "keys"),
    (b"[", 1 << 20, "lists"),
    (b"{", 1 << 20, "objects"),
    (b",", 1 << 22, "values"),
)
_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)
_OF_PYTHON = (TypeError, LookupError, AttributeError, ArithmeticError, AssertionError)
_LONGEST = 200  # characters of a reason


@contextmanager
def explained(stage: str, what: str, *, found: str = "", expected: str, remedy: str = "") -> Iterator[None]:
    """Turn whatever a reader raises in the `with` block into a CompileError about `what`, unless it is one already.

    The reason stands in brackets after `found`, or alone. Panics of libraries in Rust are no Exception and are turned too; what
    ends the program (Ctrl-C, a signal) is not.
    """
    try:
        yield
    except (BelleError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        reason = f"{found} ({_reason(error)})" if found else _reason(error)
        raise CompileError(stage, what, found=reason, expected=expected, remedy=remedy) from error


def require_regular(stage: str, file: StoredPath) -> int:
    """Return the size in bytes of a regular file, or of one that a link leads to; raises CompileError for anything else, which
    might never end when it is read, and for a file that cannot be examined."""
    with explained(stage, f"file {file}", expected="a file that can be read", remedy="check its path and permissions"):
        found = file.stat()
    if not stat.S_ISREG(found.st_mode):
        kind = next((kind for test, kind in _KINDS if test(found.st_mode)), "something else")
        raise CompileError(stage, f"file {file}", found=kind, expected="a regular file", remedy="put the file itself there")
    return found.st_size


def read_bounded(stage: str, file: StoredPath, most: int) -> bytes:
    """The bytes of a regular file; raises CompileError if it has more than `most`, before it is read, or cannot be read."""
    size = require_regular(stage, file)
    if size > most:
        raise CompileError(
            stage,
            f"file {file}",
            found=f"{size} bytes",
            expected=f"at most {most}",
            remedy="it is no file of a language model: download it again",
        )
    with explained(stage, f"file {file}", expected="a file that can be read", remedy="check its permissions"):
        with file.open("rb") as opened:
            return opened.read(most)  # bounded again, since it may have grown


def parse_bounded(text: bytes) -> Any:
    """Decode JSON in UTF-8; raises ValueError as `parse_json` does, and for a text that would become too many objects."""
    for character, most, kind in _MOST_IN_JSON:
        if text.count(character) > most:
            raise ValueError(f"more than {most} {kind}")
    return parse_json(text)


def _reason(error: BaseException) -> str:
    """One line about an exception."""
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    if isinstance(error, MemoryError):
        return "sizes that exceed the memory"
    if isinstance(error, RecursionError):
        return "values nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return f"text that is no {error.encoding} at byte {error.start}"
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, _OF_PYTHON):  # their messages are not written for users
        reason = f"values that do not fit ({type(error).__name__}{f': {line}' if line else ''})"
    else:
        reason = line or type(error).__name__
    return reason.rstrip(".") if len(reason) <= _LONGEST else f"{reason[: _LONGEST - 3]}..."
