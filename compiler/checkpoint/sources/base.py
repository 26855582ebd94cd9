"""The interface of sources: a source finds the files of a checkpoint and puts them on this host."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from belle_compile.compiler.stored_path import StoredPath, by_name

DIGEST_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class Files:
    """The files of a checkpoint on this host: those of a directory, or one file alone.

    `path` is that directory or file. `notes` are sentences for the manifest and the report about how the files were obtained.
    """

    path: StoredPath
    notes: tuple[str, ...] = ()

    @property
    def directory(self) -> StoredPath | None:
        """The directory, or None for a file alone, since the files beside it do not belong to the checkpoint."""
        return self.path if self.path.is_dir() else None

    def matching(self, pattern: str) -> list[StoredPath]:
        """The files whose names match a glob pattern, sorted."""
        if self.directory is not None:
            return by_name(self.directory.glob(pattern))
        return [self.path] if self.path.match(pattern) else []


class Source(Protocol):
    """One kind of place that checkpoints come from. `SOURCES` lists all of them in the order in which they are tried."""

    def recognises(self, name: str) -> bool:
        """Whether `name`, which the user gave, is a checkpoint of this source."""

    def fetch(self, name: str, weights: Sequence[Sequence[str]]) -> Files:
        """Put the files of that checkpoint on this host and return them.

        `weights` are glob patterns of the files that hold weights, those of the preferred format first (see `Format.weights`).
        A download needs those of one format only. Raises CompileError if the files cannot be obtained.
        """


def digests(
    files: Iterable[StoredPath], root: StoredPath, progress: Callable[[StoredPath, int, int], None] | None = None
) -> dict[str, str]:
    """The SHA-256 of every file by name, computed by streaming.

    The name of a file below `root` is relative to `root`. For other files it is the file name, prefixed by the names of
    directories as long as it is taken. `progress` is called after every chunk with (file, bytes done, bytes of all files).
    """
    files = list(dict.fromkeys(files))
    total = sum(file.stat().st_size for file in files)
    done = 0
    result: dict[str, str] = {}
    for file in files:
        digest = hashlib.sha256()
        with file.open("rb") as f:
            while chunk := f.read(DIGEST_CHUNK_BYTES):
                digest.update(chunk)
                done += len(chunk)
                if progress is not None:
                    progress(file, done, total)
        name = _relative(file, root)
        for parent in Path(str(file.parent), file.name).parents:
            if name not in result:
                break
            name = f"{parent.name}/{name}"
        result[name] = digest.hexdigest()
    return result


def _relative(file: StoredPath, root: StoredPath) -> str:
    path, start = Path(str(file.parent), file.name), Path(str(root))
    return path.relative_to(start).as_posix() if path != start and path.is_relative_to(start) else file.name
