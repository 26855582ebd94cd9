"""Layers that families share: each adds graph nodes and reads its tensors of the checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.families.model_config import STAGE
from belle_compile.compiler.ir import basis
from belle_compile.compiler.ir.build import GraphBuilder
from belle_compile.compiler.ir.lazy import lazy

if TYPE_CHECKING:
    from belle_compile.compiler.checkpoint.tensors import LazyTensor
    from belle_compile.compiler.stored_path import StoredPath

HEAD = "lm_head.weight"
COMPARED_BYTES = 1 << 25  # bytes read at a time from each of two tables that are compared
_ORDERED, _ORDERED_BYTES = "reordered", 1 << 25  # the name of a step, and the bytes that it reads at a time

Order = npt.NDArray[np.intp]


class TensorSource(Protocol):
    """The part of a checkpoint that a graph is built from: its tensors by their canonical names."""

    @property
    def path(self) -> StoredPath: ...
    @property
    def tensors(self) -> Mapping[str, LazyTensor]: ...
    def tensor(self, name: str, shape: tuple[int, ...]) -> LazyTensor:
        """Return a tensor; raises CompileError if it is missing or has another shape."""


@dataclass(frozen=True)
class Part:
    """Some rows of a stored tensor: those in `ranges`, in their order, of the tensor `name` with `rows` rows."""

    name: str
    rows: int
    ranges: tuple[tuple[int, int], ...]

    def read(self, tensor: LazyTensor, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows start..stop of the part; only these are read from the file."""
        pieces, done = [], 0
        for first, last in self.ranges:
            low, high = max(start - done, 0), min(stop - done, last - first)
            pieces += [tensor.rows(first + low, first + high)] if low < high else []
            done += last - first
        return np.concatenate(pieces) if pieces else tensor.rows(0, 0)


def _changes(outputs: int, order: Order | None, scale: float) -> basis.Changes:
    """What an order of outputs and a factor are to an adapter of the stored weight."""
    ordered = () if order is None else (basis.Change("outputs", "reorder", arrays={"order": order}),)
    factors = np.full(outputs, scale, np.float32)
    return ordered if scale == 1 else (*ordered, basis.Change("outputs", "scale", arrays={"factors": factors}))


def stored_alone(name: str) -> Part | None:
    """No part, for any tensor."""
    return None


class Layers:
    """Appends layers to the graph of `builder` and records which tensors of the checkpoint they use.

    A layer is named after its module in Transformers, and its tensors as in the checkpoint: the layer `h.0.mlp.dense_h_to_4h`
    uses the tensor `h.0.mlp.dense_h_to_4h.weight`. Tensors stay on disk until they are read. `part_of` says of which stored
    tensor one that the checkpoint lacks is a part.
    """

    def __init__(
        self, checkpoint: TensorSource, builder: GraphBuilder, part_of: Callable[[str], Part | None] = stored_alone
    ) -> None:
        self.checkpoint, self.builder, self._part_of = checkpoint, builder, part_of
        self._taken: set[str] = set()

    def weight(self, name: str, shape: tuple[int, ...], order: Order | None = None, *, scale: float = 1.0) -> ir.Value:
        """Add a float32 initializer that reads a tensor of the checkpoint. With an `order`, row i is `order[i]` of the file;
        with a `scale`, values are multiplied by it."""
        assert order is None or scale == 1, f"{name}: one change at a time"
        if name not in self.checkpoint.tensors and (part := self._part_of(name)) is not None:
            return self._unpacked(name, shape, part)
        tensor = self.checkpoint.tensor(name, shape)
        self._taken.add(name)
        sources = [tensor.describe()]
        if scale != 1:
            whole, rows = partial(_scaled, scale, tensor.read), partial(_scaled, scale, tensor.rows)
            made = lazy(name, whole, shape, np.float32, rows, step="scaled", sources=sources)
        elif order is None:
            made = lazy(name, tensor.read, shape, np.float32, tensor.rows, sources=sources, quantized=tensor.quantized)
        elif tensor.quantized is None:
            made = lazy(name, lambda: _ordered(tensor, order), shape, np.float32, step=_ORDERED, sources=sources)
        else:
            integers = tensor.quantized.reordered(order)
            made = lazy(
                name, integers.numpy, shape, np.float32, integers.rows, step=_ORDERED, sources=sources, quantized=integers
            )
        basis.record(made, _changes(shape[0], order, scale))
        return self.builder.weight(name, made)

    def _unpacked(self, name: str, shape: tuple[int, ...], part: Part) -> ir.Value:
        tensor = self.checkpoint.tensor(part.name, (part.rows, *shape[1:]))
        self._taken.add(part.name)
        rows, sources = partial(part.read, tensor), [tensor.describe()]
        made = lazy(name, partial(rows, 0, shape[0]), shape, np.float32, rows, step="unpacked", sources=sources)
        return self.builder.weight(name, made)

    def linear(
        self,
        x: ir.Value,
        name: str,
        sizes: tuple[int, int],
        *,
        bias: bool,
        order: Order | None = None,
        scale: float = 1.0,
    ) -> ir.Value:
        """Append (x @ weight.T + bias) * scale; `sizes` are (outputs, inputs), the shape of the weight."""
        weight = self.weight(f"{name}.weight", sizes, order, scale=scale)
        addend = self.weight(f"{name}.bias", sizes[:1], order, scale=scale) if bias else None
        return self.builder.op("Gemm", x, weight, addend, name=name, transB=1)

    def layer_norm(self, x: ir.Value, name: str, size: int, epsilon: float) -> ir.Value:
        """Append a LayerNormalization of the last axis, with scale and bias of shape [size]."""
        scale, bias = self.weight(f"{name}.weight", (size,)), self.weight(f"{name}.bias", (size,))
        return self.builder.op("LayerNormalization", x, scale, bias, name=name, axis=-1, epsilon=epsilon)

    def rms_norm(self, x: ir.Value, name: str, size: int, epsilon: float, *, scale: float = 1.0) -> ir.Value:
        """Append an RMSNormalization of the last axis, with gains of shape [size], times `scale`."""
        gain = self.weight(f"{name}.weight", (size,), scale=scale)
        return self.builder.op("RMSNormalization", x, gain, name=name, axis=-1, epsilon=epsilon)

    def head_norm(self, x: ir.Value, name: str, head_dim: int, epsilon: float) -> ir.Value:
        """Append a HeadNorm, with a scale of shape [head_dim] for all heads."""
        return self.builder.op("HeadNorm", x, self.weight(f"{name}.weight", (head_dim,)), name=name, epsilon=epsilon)

    def embedding_and_head(self, name: str, shape: tuple[int, int], *, tied: bool) -> tuple[ir.Value, ir.Value]:
        """Add the embedding table and the head's weight, both of `shape` [vocabulary, hidden]; a tied head is the table.

        A file may store a tied head beside the table (pickles, some converters) or in its place. If it has both, they are read
        and compared; two that differ are refused, because Transformers 4 would tie them and Transformers 5 would not.
        """
        table, tensors = f"{name}.weight", self.checkpoint.tensors
        if not tied:
            if HEAD not in tensors and table in tensors:
                expected = f"one of shape {list(shape)}, as tie_word_embeddings is false"
                remedy = "set tie_word_embeddings to true in config.json if the head is the embedding"
                raise self._error(f"tensor {HEAD}", "no such tensor", expected, remedy)
            return self.weight(table, shape), self.weight(HEAD, shape)  # the table first: without it, its names are not these
        if HEAD in tensors and table in tensors:
            if not _equal(self.checkpoint.tensor(table, shape), self.checkpoint.tensor(HEAD, shape)):
                expected = "the same, as tie_word_embeddings is true"
                remedy = f"set tie_word_embeddings to false in config.json to use it, or remove {HEAD}"
                raise self._error(f"tensor {HEAD}", f"other values than in {table}", expected, remedy)
            self._taken.add(HEAD)
        shared = self.weight(HEAD if HEAD in tensors and table not in tensors else table, shape)
        return shared, shared

    def check_all_taken(self) -> None:
        """Raise CompileError if the checkpoint has a tensor that no layer took, apart from `spare` ones that hold zeros."""
        tensors = self.checkpoint.tensors
        unused = sorted(name for name in tensors.keys() - self._taken if not tensors[name].spare or tensors[name].read().any())
        if unused:
            names = ", ".join(unused[:4]) + (f" and {len(unused) - 4} more" if len(unused) > 4 else "")
            remedy = "the weights do not belong to this config.json, or are of another architecture"
            raise self._error(
                "tensors", f"{names}, which the graph does not use", "only tensors that config.json implies", remedy
            )

    def _error(self, what: str, found: str, expected: str, remedy: str) -> CompileError:
        return CompileError(STAGE, f"{what} of {self.checkpoint.path}", found=found, expected=expected, remedy=remedy)


def _ordered(tensor: LazyTensor, order: Order) -> npt.NDArray[np.float32]:
    """The rows of a tensor in another order. They are read as they lie, a part at a time."""
    values, places = np.empty(tensor.shape, np.float32), np.argsort(order)
    step = max(1, _ORDERED_BYTES * len(order) // values.nbytes)
    for start in range(0, len(order), step):
        part = slice(start, min(start + step, len(order)))
        values[places[part]] = tensor.rows(part.start, part.stop)
    return values


def _scaled(scale: float, read: Callable[..., npt.NDArray[np.float32]], *rows: int) -> npt.NDArray[np.float32]:
    """What `read` gives, times `scale`."""
    values: npt.NDArray[np.float32] = read(*rows) * np.float32(scale)
    return values


def _equal(a: LazyTensor, b: LazyTensor) -> bool:
    count, width = a.shape
    step = max(1, COMPARED_BYTES // (4 * width))
    parts = ((start, min(start + step, count)) for start in range(0, count, step))
    return all(np.array_equal(a.rows(*part), b.rows(*part), equal_nan=True) for part in parts)
