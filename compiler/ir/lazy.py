"""Weights that are computed when they are read, and not before."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from belle_compile.compiler.errors import CompileError

Array = npt.NDArray[Any]
Rows = Callable[[int, int], Array]
_PIECES, _ROWS = "pieces", "rows"  # in the meta of a tensor


def lazy(
    name: str,
    compute: Callable[[], Array],
    shape: Sequence[int],
    dtype: ir.DataType | npt.DTypeLike,
    rows: Rows | None = None,
) -> ir.LazyTensor:
    """A tensor whose values `compute` returns on every read; nothing is kept but inside of `keeping`. With `rows(start, stop)`
    some rows can be read alone, see `read_rows`.

    A read raises CompileError where the result has another shape or dtype than announced.
    """
    element = dtype if isinstance(dtype, ir.DataType) else ir.DataType.from_numpy(np.dtype(dtype))
    expected = f"{element.numpy()}{list(shape)}"
    key = object()

    def values() -> Array:
        array = compute()
        found = f"{array.dtype}{list(array.shape)}"
        if found != expected:
            raise CompileError("weights", f"tensor {name}", found=found, expected=expected)
        return np.ascontiguousarray(array)

    def read() -> ir.Tensor[Array]:
        return ir.Tensor(_kept.read(key, values) if _kept else values(), dtype=element, name=name)

    tensor = ir.LazyTensor(read, dtype=element, shape=ir.Shape(shape), name=name)
    if rows is not None:
        tensor.meta[_ROWS] = rows
    return tensor


def has_rows(tensor: ir.TensorProtocol) -> bool:
    """Whether some rows can be read without computing all of them."""
    return _ROWS in tensor.meta


def read_rows(tensor: ir.TensorProtocol, start: int, stop: int) -> Array:
    """Rows of a tensor that `has_rows`, in an array that nobody else has: tables are the largest tensors of a model, and what
    takes them row by row never holds one in float32."""
    rows: Rows = tensor.meta[_ROWS]
    array = rows(start, stop)
    return array if array.flags.writeable and array.flags.owndata else np.array(array)


@contextmanager
def keeping(most: int) -> Iterator[None]:
    """Inside, values of lazy tensors that were read last are kept, up to `most` bytes: tensors that are computed from the same
    ones are read in one go without computing these again. What is kept cannot be written to."""
    global _kept
    outer, _kept = _kept, _Kept(most)
    try:
        yield
    finally:
        _kept = outer


class _Kept:
    """The arrays used last, by key."""

    def __init__(self, most: int) -> None:
        self._most, self._bytes = most, 0
        self._arrays: OrderedDict[object, Array] = OrderedDict()

    def read(self, key: object, compute: Callable[[], Array]) -> Array:
        """What is kept for a key, or what is computed now, as a read-only view."""
        if key in self._arrays:
            self._arrays.move_to_end(key)
            return self._arrays[key]
        array: Array = compute().view()
        array.setflags(write=False)
        self._arrays[key] = array
        self._bytes += array.nbytes
        while self._bytes > self._most:
            self._bytes -= self._arrays.popitem(last=False)[1].nbytes
        return array


_kept: _Kept | None = None


def part_of(whole: ir.TensorProtocol, ranges: Sequence[tuple[int, int]], axis: int, name: str) -> ir.LazyTensor:
    """Some rows (axis 0) or columns (axis 1) of a tensor, range by range. Inside of `wholes_kept` the tensor is read once for
    all of its parts."""
    shape = list(whole.shape.numpy())
    shape[axis] = sum(stop - start for start, stop in ranges)

    def take() -> Array:
        array = whole.numpy() if _wholes is None else _wholes.read(whole)
        parts = [array[start:stop] if axis == 0 else array[:, start:stop] for start, stop in ranges]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis)

    part = lazy(name, take, shape, whole.dtype)
    part.meta[_PIECES] = [Piece(whole, tuple(ranges), axis)]
    return part


@dataclass(frozen=True)
class Piece:
    """Where values of one tensor come from another: its rows or columns `ranges` lie there behind each other, from row `at`."""

    tensor: ir.TensorProtocol
    ranges: tuple[tuple[int, int], ...]
    axis: int = 0
    at: int = 0


def made_of(tensor: ir.LazyTensor, parts: Sequence[ir.TensorProtocol]) -> ir.LazyTensor:
    """The tensor, with a record that it is these ones stacked along axis 0."""
    pieces, at = [], 0
    for part in parts:
        rows = part.shape.numpy()[0]
        pieces.append(Piece(part, ((0, rows),), at=at))
        at += rows
    tensor.meta[_PIECES] = pieces
    return tensor


def pieces_of(tensor: ir.TensorProtocol) -> list[Piece]:
    """What a tensor of `part_of` or `made_of` is made of; nothing for others."""
    found: list[Piece] = tensor.meta.get(_PIECES, [])
    return found


@contextmanager
def wholes_kept() -> Iterator[None]:
    """Inside, tensors that `part_of` takes parts of are kept once they are read: ranks that read their parts of the same ones
    in turn compute these once. They are all in memory until the end, so that it is for a few tensors at a time."""
    global _wholes
    outer, _wholes = _wholes, _Wholes()
    try:
        yield
    finally:
        _wholes = outer


class _Wholes:
    """Values of tensors that have been read."""

    def __init__(self) -> None:
        self._arrays: dict[int, tuple[ir.TensorProtocol, Array]] = {}  # by identity; the tensor is kept so that it stays unique

    def read(self, tensor: ir.TensorProtocol) -> Array:
        """What is kept of a tensor, or what is computed now, as a read-only view."""
        if id(tensor) not in self._arrays:
            array: Array = tensor.numpy().view()
            array.setflags(write=False)
            self._arrays[id(tensor)] = tensor, array
        return self._arrays[id(tensor)][1]


_wholes: _Wholes | None = None


class Shared:
    """Several tensors computed at once from one source, such as a weight's integers and their scales.

    Only the result of the source that was asked last is kept, whichever object that is: reading a model's weights
    in order computes each source once and holds one result at a time.
    """

    _lock = threading.RLock()
    _latest: Shared | None = None
    _result: tuple[Array, ...] = ()

    def __init__(self, compute: Callable[[], tuple[Array, ...]]) -> None:
        self._compute = compute

    def __getitem__(self, index: int) -> Array:
        with Shared._lock:
            if Shared._latest is not self:
                Shared._latest, Shared._result = None, ()  # free the old result before the new one is made
                result = self._compute()
                Shared._latest, Shared._result = self, result
            return Shared._result[index]
