"""The interface of overlays: an overlay maps the lazy tensors of a checkpoint to lazy tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from belle_compile.compiler.checkpoint.tensors import LazyTensor


@dataclass(frozen=True)
class Overlaid:
    """The result of an overlay: tensors by their canonical names, sentences for the manifest and the report, and the files that
    it read."""

    tensors: Mapping[str, LazyTensor]
    notes: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()


class Overlay(Protocol):
    """A change to the tensors of a checkpoint, such as an adapter from fine-tuning."""

    def apply(self, tensors: Mapping[str, LazyTensor]) -> Overlaid:
        """Return all tensors of the checkpoint; `LazyTensor.changed` makes those that change, so that their steps name the
        overlay.

        Only headers are read; values are read when a tensor's values are. Raises CompileError if the overlay does not belong to
        these tensors, also if it would change none.
        """


def apply_overlays(tensors: Mapping[str, LazyTensor], overlays: Iterable[Overlay]) -> Overlaid:
    """The tensors after all overlays, the first one applied first, with the notes and files of all."""
    result = Overlaid(tensors)
    for overlay in overlays:
        applied = overlay.apply(result.tensors)
        result = replace(applied, notes=result.notes + applied.notes, files=result.files + applied.files)
    return result
