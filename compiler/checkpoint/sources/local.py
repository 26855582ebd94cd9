"""Checkpoints that are on this host already: a directory, or a file alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from belle_compile.compiler.checkpoint.sources.base import Files


class LocalDirectory:
    """A directory of files."""

    def recognises(self, name: str) -> bool:
        return Path(name).expanduser().is_dir()

    def fetch(self, name: str, weights: Sequence[Sequence[str]]) -> Files:
        return Files(Path(name).expanduser())


class LocalFile:
    """A file that is a whole checkpoint, as GGUF files are."""

    def recognises(self, name: str) -> bool:
        return Path(name).expanduser().is_file()

    def fetch(self, name: str, weights: Sequence[Sequence[str]]) -> Files:
        return Files(Path(name).expanduser())
