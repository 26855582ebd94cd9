"""The whole weights of an engine, assembled from the packed tensors of its ranks when they are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from safetensors import safe_open

from belle_compile.compiler.backends import Repartitionable
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.ir.lazy import lazy, pieces_of
from belle_compile.compiler.ir.signature import dtype_name
from belle_compile.runtime.program import WEIGHTS_NAME

Array = npt.NDArray[Any]


class WholeWeights:
    """Lazy tensors for the weights of an engine's graph, which is stored without values.

    `tensor` makes one for each weight of the graph. `find` then looks for their values in the graphs of the ranks, whose
    initializers are these tensors, parts of them, or parts stacked by fusion, as `part_of` and `made_of` record.
    """

    def __init__(self, engine: Path, backend: Repartitionable) -> None:
        """`engine` is the engine's directory, `backend` the one that packed its weights."""
        self._engine, self._backend = engine, backend
        # The rank, the name and the tensor of the rank's graph, for each place of a weight; keys are identities of weights
        self._places: dict[int, list[tuple[int, str, ir.TensorProtocol]]] = {}
        self._tensors: list[ir.TensorProtocol] = []

    def tensor(self, name: str, shape: Sequence[int], dtype: ir.DataType) -> ir.LazyTensor:
        """A weight whose values can be read after `find`."""
        made = lazy(name, lambda: self._read(made), shape, dtype, sources=[f"{self._engine}: {name}"])
        self._tensors.append(made)
        return made

    def find(self, ranks: Sequence[ir.Model]) -> None:
        """Record which tensors of the ranks' graphs hold each weight; raises CompileError if one of them is missing."""
        for rank, model in enumerate(ranks):
            for name, value in model.graph.initializers.items():
                if value.const_value is not None:
                    for whole in _wholes(value.const_value):
                        self._places.setdefault(id(whole), []).append((rank, name, value.const_value))
        missing = [str(tensor.name) for tensor in self._tensors if id(tensor) not in self._places]
        if missing:
            found = f"no {missing[0]}"
            raise CompileError("repartition", f"weights of {self._engine}", found=found, expected="all weights of its graph")

    def _read(self, whole: ir.TensorProtocol) -> Array:
        result = np.empty(whole.shape.numpy(), whole.dtype.numpy())
        for rank, name, tensor in self._places[id(whole)]:
            file = self._engine / f"rank{rank}" / WEIGHTS_NAME
            with safe_open(file, framework="numpy") as weights:
                packed = weights.get_tensor(name)
            values = self._backend.unpack(packed, tuple(tensor.shape.numpy()), dtype_name(tensor.dtype))
            _copy(values, tensor, whole, result)
            if tensor is whole:
                break  # every rank has all of it
        return result


def _wholes(tensor: ir.TensorProtocol) -> Iterator[ir.TensorProtocol]:
    """The tensors that `tensor` is made of in the end: those which have no pieces themselves."""
    pieces = pieces_of(tensor)
    for piece in pieces:
        yield from _wholes(piece.tensor)
    if not pieces:
        yield tensor


def _copy(array: Array, tensor: ir.TensorProtocol, whole: ir.TensorProtocol, result: Array) -> None:
    """Copy from `array`, the values of `tensor`, the part of `whole` that it holds to its place in `result`, the values of
    `whole`."""
    if tensor is whole:
        result[...] = array
    for piece in pieces_of(tensor):
        if piece.tensor is not whole:  # stacked parts
            rows = piece.tensor.shape.numpy()[0] if pieces_of(piece.tensor) else 0
            _copy(array[piece.at : piece.at + rows], piece.tensor, whole, result)
            continue
        at = piece.at
        for start, stop in piece.ranges:
            target = (slice(None),) * piece.axis + (slice(start, stop),)
            source = (slice(None),) * piece.axis + (slice(at, at + stop - start),)
            result[target] = array[source]
            at += stop - start
