"""Changes of basis of a linear's inputs and outputs, which passes record on its weight so that adapters can follow them.

A low-rank change of a checkpoint's weight is b @ a, with a [rank, inputs] and b [outputs, rank]. A pass that replaces a
weight W by N W M replaces it by (N b) @ (a M): what it does to the inputs concerns `a` alone, what it does to the outputs `b`
alone. So a pass says it of rows of numbers: those of `a`, or the columns of `b`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy.typing as npt
import onnx_ir as ir

Side = Literal["inputs", "outputs"]
Kind = Literal["scale", "rotate", "center", "reorder", "shift"]
_CHANGES = "changes of basis"  # key in a tensor's meta


@dataclass(frozen=True)
class Change:
    """One change of basis, as a function of rows x [rows, width]; `runtime/adapters/basis.py` carries it out.

    scale: x[:, start:stop] is multiplied by `factors`. rotate: each run of len(signs) columns in start..stop is multiplied by
    `signs`, Hadamard transformed in blocks, and the blocks are mixed by `mixer`. center: the mean of each row is subtracted.
    reorder: column i becomes column `order`[i]. shift: the inputs lack the addend `vector`, so that each row's product with it
    is added to what the row computes.
    """

    side: Side
    kind: Kind
    start: int = 0
    stop: int | None = None
    arrays: Mapping[str, npt.NDArray[Any] | ir.TensorProtocol] = field(default_factory=dict)


Changes = tuple[Change, ...]


@dataclass(frozen=True)
class AdaptedLinear:
    """A linear of the checkpoint: its `name`, the node that computes its float32 `result`, and its input, float32 or integers
    with a scale per token. `changes` are those of its basis, from the checkpoint's weight to the graph's."""

    name: str
    result: ir.Value
    inputs: tuple[ir.Value, ...]
    sizes: tuple[int, int]
    changes: Changes


def changes_of(tensor: ir.TensorProtocol) -> Changes | None:
    """The changes of basis from the checkpoint's weight to this tensor, in order; None if a step did not say them."""
    changes: Changes | None = tensor.meta.get(_CHANGES, ())
    return changes


def record(tensor: ir.TensorProtocol, changes: Changes | None) -> None:
    """Let a new tensor have these changes; None says that they are not known."""
    tensor.meta[_CHANGES] = changes


def changed(source: ir.TensorProtocol, changes: Iterable[Change] | None) -> Changes | None:
    """The changes of a tensor that is computed from `source` by further ones; None stands for some that are not known."""
    before = changes_of(source)
    return None if before is None or changes is None else (*before, *changes)
