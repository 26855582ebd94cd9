"""The paths that readers of checkpoints take: they need not know whether a file's bytes lie on disk as they read them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import IO, Literal, Protocol


class StoredPath(Protocol):
    """The part of `pathlib.Path` that readers of checkpoints use: a directory, or a file that is opened for reading bytes.

    A Path is one. So is a file of an encrypted release (checkpoint/sources/encrypted.py), whose plaintext exists only in the
    buffers of those who read it. `name` is the name that its readers know a file by; str() is the place on disk, for messages.
    """

    @property
    def name(self) -> str: ...

    @property
    def suffix(self) -> str: ...

    @property
    def parent(self) -> StoredPath: ...

    def __truediv__(self, name: str, /) -> StoredPath: ...

    def __hash__(self) -> int: ...

    def is_file(self) -> bool: ...

    def is_dir(self) -> bool: ...

    def match(self, pattern: str, /) -> bool: ...

    def glob(self, pattern: str, /) -> Iterable[StoredPath]: ...

    def iterdir(self) -> Iterable[StoredPath]: ...

    def stat(self) -> os.stat_result: ...

    def open(self, mode: Literal["rb"], /) -> IO[bytes]: ...


def by_name(files: Iterable[StoredPath]) -> list[StoredPath]:
    """Files in the order of their places and names."""
    return sorted(files, key=lambda file: (str(file.parent), file.name))
