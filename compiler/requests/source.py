"""Stream the lines of a file, plain, gzip or zstd, and digest the file while it is read."""

from __future__ import annotations

import gzip
import hashlib
import io
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.requests.request import STAGE

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_COMPRESSED = {".gz": "gzip", ".gzip": "gzip", ".zst": "zstd", ".zstd": "zstd"}
_LONGEST_LINE = 16 << 20
_BUFFER = 1 << 18
_MOST_UNPACKED = 1000  # bytes of a byte of compressed data; logs have 10 to 100
_UNPACKED_AT_LEAST = 64 << 20  # bytes that are read whatever their ratio

Progress = Callable[[int, int], None]


class Source:
    """The lines of a file. Once all lines were read, `sha256` and `bytes` describe the file as it is stored.

    The compression is detected from the first bytes, so that a pipe can be read too. Raises CompileError for a file that is
    missing, damaged or truncated, for a line above 16 MiB, and for data that unpack to more than 1000 times their size.
    `on_progress(done, total)` is called with bytes of the file.
    """

    def __init__(self, path: str | Path, on_progress: Progress = lambda done, total: None) -> None:
        self.path = Path(path)
        self.bytes, self.sha256 = 0, ""
        self._on_progress = on_progress

    @property
    def suffix(self) -> str:
        """The suffix of the file name without that of the compression: ".jsonl" for requests.jsonl.gz."""
        names = [suffix.lower() for suffix in self.path.suffixes]
        if names and names[-1] in _COMPRESSED:
            names.pop()
        return names[-1] if names else ""

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Iterate over (number from 1, bytes without the line break) of each line; a byte order mark is skipped."""
        with self._open() as file:
            raw = _Digested(file, self._on_progress)
            buffered = io.BufferedReader(raw, _BUFFER)
            stream, kind = self._decompressed(buffered)
            number = unpacked = 0
            try:
                while line := stream.readline(_LONGEST_LINE + 1):
                    number += 1
                    unpacked += len(line)
                    if unpacked > _UNPACKED_AT_LEAST + _MOST_UNPACKED * raw.bytes:
                        found = f"{kind} data that unpack to more than {_MOST_UNPACKED} times their size"
                        raise self._refuse(str(self.path), found, "a file of requests", "unpack it yourself if it is one")
                    if len(line) > _LONGEST_LINE:
                        raise self._refuse(f"line {number} of {self.path}", "more than 16 MiB", "one request a line")
                    yield number, line.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").rstrip(b"\r\n")
            except EOFError:
                found = f"the end of the file amid its {kind} data, after line {number}"
                raise self._refuse(str(self.path), found, f"a complete {kind} file", "copy it again") from None
            except (OSError, zlib.error, zstd.ZstdError, MemoryError, ValueError) as error:
                found = f"damaged {kind} data after line {number} ({error})"
                raise self._refuse(str(self.path), found, f"an intact {kind} file", "copy it again") from error
            while buffered.read(_BUFFER):  # padding that the decompressor has not read
                pass
            self.bytes, self.sha256 = raw.bytes, raw.digest.hexdigest()

    def _open(self) -> io.FileIO:
        try:
            return open(self.path, "rb", buffering=0)
        except IsADirectoryError:
            found, remedy = "a directory", "give the file in it"
        except FileNotFoundError:
            found, remedy = "nothing there", "check the path"
        except OSError as error:
            found, remedy = error.strerror or str(error), "check the file's permissions"
        raise self._refuse(str(self.path), found, "a file of requests", remedy)

    def _decompressed(self, buffered: io.BufferedReader[Any]) -> tuple[BinaryIO, str]:
        """Return the decompressed stream and the name of the compression."""
        head = buffered.peek(4)
        if head.startswith(_GZIP):
            return cast("BinaryIO", gzip.GzipFile(fileobj=buffered)), "gzip"
        if head.startswith(_ZSTD):
            return cast("BinaryIO", zstd.ZstdFile(cast("BinaryIO", buffered))), "zstd"
        named = _COMPRESSED.get(self.path.suffix.lower())
        if named and head:
            found = f"a file named {self.path.suffix} that does not begin as {named} does"
            raise self._refuse(str(self.path), found, f"{named} data", "give it the name that fits its content")
        return buffered, "plain"

    def _refuse(self, what: str, found: str, expected: str, remedy: str = "") -> CompileError:
        return CompileError(STAGE, what, found=found, expected=expected, remedy=remedy)


class _Digested(io.RawIOBase):
    """A stream that digests and counts the bytes that are read through it."""

    def __init__(self, file: io.FileIO, on_progress: Progress) -> None:
        self.digest, self.bytes = hashlib.sha256(), 0
        self._file, self._on_progress = file, on_progress
        self._total = file.seek(0, io.SEEK_END) if file.seekable() else 0
        if self._total:
            file.seek(0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer) or 0
        self.digest.update(memoryview(buffer)[:count])
        self.bytes += count
        self._on_progress(self.bytes, self._total)
        return count
