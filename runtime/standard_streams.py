"""Standard input and output of the commands: closed, full, or not in the encoding that they should have."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import TextIO

from belle_compile.runtime.errors import BelleError

_EXIT_CODE = 1
# What a write to the output can fail with; other errors without a file's name are those of sockets, for example.
_OF_OUTPUTS = frozenset({errno.EBADF, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOSPC, errno.EPIPE})


@contextlib.contextmanager
def standard_streams(program: str) -> Iterator[None]:
    """Run a command, so that a stream which fails ends it with exit code 1 and one sentence on stderr.

    A closed input is empty, a closed stderr is not written to. Without an output there is no use in any answer, so the command
    does not begin. UTF-8 is read with or without a byte order mark. Characters that the encoding of the output lacks are
    written as escapes. Where BELLE_TRACEBACK is set, errors are raised.
    """
    try:
        _prepare()
        yield
    except OSError as error:
        if not is_of_output(error) or os.environ.get("BELLE_TRACEBACK"):
            raise
        _leave(program, "" if error.errno == errno.EPIPE else f"the output cannot be written: found {error.strerror}")
    except UnicodeDecodeError as error:
        if os.environ.get("BELLE_TRACEBACK"):
            raise
        _leave(program, str(input_error(error)).rstrip("."))
    finally:  # what is left in buffers, while somebody can still be told that it is lost
        _flush(program)


def is_of_output(error: BaseException) -> bool:
    """Whether an error may be that of writing to the output."""
    return isinstance(error, OSError) and error.filename is None and error.errno in _OF_OUTPUTS


def input_error(error: UnicodeDecodeError) -> BelleError:
    """The error about an input in another encoding."""
    found = f"byte 0x{error.object[error.start]:02X}, which is no {error.encoding.upper().removesuffix('-SIG')} there"
    remedy = "convert it, for example with iconv -f GB18030 -t UTF-8"
    return BelleError("input", "it cannot be read", found=found, remedy=remedy)


def _prepare() -> None:
    """Open what is closed, or a file that is opened later would take its place."""
    if sys.stderr is None:
        sys.stderr = _nowhere(2, os.O_WRONLY)
    if sys.stdin is None:
        sys.stdin = _nowhere(0, os.O_RDONLY)
    if sys.stdout is None:
        sys.stdout = _nowhere(1, os.O_RDONLY)  # to which nothing can be written
        raise OSError(errno.EBADF, "that it is closed")
    if isinstance(sys.stdin, io.TextIOWrapper) and sys.stdin.errors != "replace":
        encoding = sys.stdin.encoding.lower().replace("_", "-")
        with contextlib.suppress(io.UnsupportedOperation):  # of a stream that was read from already
            sys.stdin.reconfigure(encoding="utf-8-sig" if encoding in ("utf-8", "ascii") else encoding, errors="strict")
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="backslashreplace")


def _nowhere(descriptor: int, flags: int) -> TextIO:
    opened = os.open(os.devnull, flags)
    if opened != descriptor:
        os.dup2(opened, descriptor)
        os.close(opened)
    writable = flags == os.O_WRONLY or descriptor == 1
    return open(descriptor, "w" if writable else "r", encoding="utf-8", errors="backslashreplace", closefd=False)


def _flush(program: str) -> None:
    try:
        sys.stdout.flush()
    except ValueError:  # it is closed
        return
    except OSError as error:
        if os.environ.get("BELLE_TRACEBACK"):
            raise
        _leave(program, "" if error.errno == errno.EPIPE else f"the output cannot be written: found {error.strerror}")


def _leave(program: str, sentence: str) -> None:
    """Say what is wrong, and end without another try to write what the output did not take."""
    if sentence:
        with contextlib.suppress(OSError, ValueError):
            print(f"{program}: {sentence}.", file=sys.stderr, flush=True)
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)
    sys.exit(_EXIT_CODE)
