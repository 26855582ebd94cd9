"""What an overlay is: it takes the lazy tensors of a checkpoint and returns lazy tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from belle_compile.compiler.checkpoint.tensors import LazyTensor


@dataclass(frozen=True)
class Overlaid:
    """Tensors by their canonical names after an overlay, sentences for the manifest and the report, and the files it read."""

    tensors: Mapping[str, LazyTensor]
    notes: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()


class Overlay(Protocol):
    """Something that is laid over a checkpoint, such as an adapter that fine-tuning made."""

    def apply(self, tensors: Mapping[str, LazyTensor]) -> Overlaid:
        """All tensors of the checkpoint, those that change replaced by `LazyTensor.changed`, so that they name the overlay.

        Reads headers only; values are read when the tensors are. Raises CompileError where the overlay is not for these
        tensors: one that would change nothing is an error.
        """


def apply_overlays(tensors: Mapping[str, LazyTensor], overlays: Iterable[Overlay]) -> Overlaid:
    """The tensors after all overlays, the first one applied first, with the notes and files of all."""
    result = Overlaid(tensors)
    for overlay in overlays:
        applied = overlay.apply(result.tensors)
        result = replace(applied, notes=result.notes + applied.notes, files=result.files + applied.files)
    return result
