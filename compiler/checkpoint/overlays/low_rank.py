"""The arithmetic of LoRA adapters, in float32 as PEFT merges them into a float32 model (`merge_and_unload`).

Every function returns the tensor with values that are computed when rows of it are read. Rows are computed in blocks that begin
at multiples of the same number, so that a row has the same bits whichever rows are read with it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from belle_compile.compiler.checkpoint.tensors import FloatArray, LazyTensor

_BLOCK = 512  # rows that are computed at a time: 23 MB of float32 in the widest layer of a 7B model
_LATEST = threading.local()


@dataclass(frozen=True)
class Factors:
    """Two factors of a change of low rank, what their product is multiplied with, and DoRA's magnitudes (None without DoRA)."""

    a: LazyTensor
    b: LazyTensor
    scaling: float
    magnitude: LazyTensor | None = None

    def read(self) -> tuple[FloatArray, FloatArray]:
        """Both factors. Each thread keeps those that it read last, since some weights are read in many parts."""
        latest: tuple[Factors, FloatArray, FloatArray] | None = getattr(_LATEST, "read", None)
        if latest is None or latest[0] is not self:
            latest = _LATEST.read = self, self.a.read(), self.b.read()
        return latest[1:]


def linear(base: LazyTensor, factors: Factors, step: str) -> LazyTensor:
    """The weight [outputs, inputs] of a linear layer plus scaling * b @ a, with a [rank, inputs] and b [outputs, rank].

    With magnitudes [outputs], each row of the sum is then scaled to the length that its magnitude says
    (https://arxiv.org/abs/2402.09353).
    """

    def load(start: int, stop: int) -> FloatArray:
        rows, (a, b) = _writable(base.rows(start, stop)), factors.read()
        magnitudes = None if factors.magnitude is None else factors.magnitude.rows(start, stop)
        for block, inside, part in _blocks(start, stop, base.shape[0]):
            delta = b[block] @ a
            delta *= np.float32(factors.scaling)
            rows[part] += delta[inside]
            if magnitudes is not None:
                rows[part] *= (magnitudes[part] / np.linalg.norm(rows[part], axis=1))[:, None]
        return rows

    return base.changed(step, load)


def embedding(base: LazyTensor, factors: Factors, step: str) -> LazyTensor:
    """The table [vocabulary, hidden] plus scaling * (b @ a).T, with a [rank, vocabulary] and b [hidden, rank].

    With magnitudes [hidden], each column of the sum is then scaled to the length that its magnitude says.
    """
    table = _Table(base, factors)
    return base.changed(step, table.rows if factors.magnitude is None else table.scaled)


def replaced_rows(base: LazyTensor, rows: Mapping[int, int], values: LazyTensor, step: str) -> LazyTensor:
    """The table with other values in some rows: `rows` maps a row to the row of `values` that takes its place."""

    def load(start: int, stop: int) -> FloatArray:
        result, own = _writable(base.rows(start, stop)), values.read()
        for row, source in rows.items():
            if start <= row < stop:
                result[row - start] = own[source]
        return result

    return base.changed(step, load)


def shifted(base: LazyTensor, addend: LazyTensor, scaling: float, step: str) -> LazyTensor:
    """The bias plus scaling * `addend`, both [outputs]."""

    def load(start: int, stop: int) -> FloatArray:
        result: FloatArray = base.rows(start, stop) + np.float32(scaling) * addend.rows(start, stop)
        return result

    return base.changed(step, load)


@dataclass(frozen=True)
class _Table:
    """An embedding table with a change of low rank."""

    base: LazyTensor
    factors: Factors

    def rows(self, start: int, stop: int) -> FloatArray:
        rows, (a, b) = _writable(self.base.rows(start, stop)), self.factors.read()
        for block, inside, part in _blocks(start, stop, self.base.shape[0]):
            delta = a[:, block].T @ b.T
            delta *= np.float32(self.factors.scaling)
            rows[part] += delta[inside]
        return rows

    def scaled(self, start: int, stop: int) -> FloatArray:
        rows = self.rows(start, stop)
        rows *= self._factor
        return rows

    @cached_property
    def _factor(self) -> FloatArray:
        """What each column is multiplied with; the only values that are kept, as they take a run over the whole table."""
        assert self.factors.magnitude is not None, "without magnitudes nothing is scaled"
        squares = np.zeros(self.base.shape[1], np.float64)
        for block, _, _ in _blocks(0, self.base.shape[0], self.base.shape[0]):
            squares += np.square(self.rows(block.start, block.stop), dtype=np.float64).sum(axis=0)
        return np.divide(self.factors.magnitude.read(), np.sqrt(squares), dtype=np.float32, casting="same_kind")


def _blocks(start: int, stop: int, count: int) -> Iterator[tuple[slice, slice, slice]]:
    """The blocks of `count` rows with any of start..stop: the rows of each, those asked for, and these in the result."""
    for first in range(start - start % _BLOCK, stop, _BLOCK):
        last = min(first + _BLOCK, count)
        low, high = max(first, start), min(last, stop)
        yield slice(first, last), slice(low - first, high - first), slice(low - start, high - start)


def _writable(rows: FloatArray) -> FloatArray:
    return rows if rows.flags.writeable else rows.copy()
