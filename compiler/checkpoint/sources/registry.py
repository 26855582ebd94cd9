"""The list of all sources, and the choice of the one that a name belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from belle_compile.compiler.checkpoint.sources.base import Files, Source
from belle_compile.compiler.checkpoint.sources.hub import Hub
from belle_compile.compiler.checkpoint.sources.local import LocalDirectory, LocalFile
from belle_compile.compiler.places import no_checkpoint

# The first source that recognises a name is used, so files on this host outrank a download.
SOURCES: tuple[Source, ...] = (
    LocalDirectory(),
    LocalFile(),
    Hub(),
)


def fetch(name: str | Path, weights: Sequence[Sequence[str]]) -> Files:
    """The files of the checkpoint that the user named; `weights` is as in `Source.fetch`. Raises CompileError if no source
    recognises the name."""
    for source in SOURCES:
        if source.recognises(str(name)):
            return source.fetch(str(name), weights)
    raise no_checkpoint(name)
