"""The interface of overlays: an overlay maps the lazy tensors of a checkpoint to lazy tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from belle_compile.compiler.checkpoint.tensors import LazyTensor
from belle_compile.compiler.stored_path import StoredPath


@dataclass(frozen=True)
class Overlaid:
    """The result of an overlay: tensors by their canonical names, sentences for the manifest and the report, the files that it
    read, the keys of config.json that have other values with these tensors, and the directory whose tokenizer belongs to them
    (None: that of the checkpoint)."""

    tensors: Mapping[str, LazyTensor]
    notes: tuple[str, ...] = ()
    files: tuple[StoredPath, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: StoredPath | None = None


class Overlay(Protocol):
    """A change to the tensors of a checkpoint, such as an adapter from fine-tuning."""

    def apply(self, tensors: Mapping[str, LazyTensor], config: Mapping[str, Any]) -> Overlaid:
        """Return all tensors of the checkpoint with this config.json; `LazyTensor.changed` makes those that change, so that
        their steps name the overlay.

        Only headers are read; values are read when a tensor's values are. Raises CompileError if the overlay does not belong to
        these tensors, also if it would change none.
        """


def apply_overlays(tensors: Mapping[str, LazyTensor], config: Mapping[str, Any], overlays: Iterable[Overlay]) -> Overlaid:
    """The tensors and the whole config.json after all overlays, the first one applied first, with the notes and files of
    all."""
    result = Overlaid(tensors, config=config)
    for overlay in overlays:
        applied = overlay.apply(result.tensors, result.config)
        notes, files = result.notes + applied.notes, result.files + applied.files
        config = {**result.config, **applied.config}
        result = Overlaid(applied.tensors, notes, files, config, applied.tokenizer or result.tokenizer)
    return result
