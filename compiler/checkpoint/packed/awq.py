"""AWQ as AutoAWQ's version "gemm" stores it, which is what nearly all releases have.

A linear of K inputs and N outputs in groups of g inputs has::

    qweight int32 [K, N/8]     eight neighbouring outputs in a word, in the order 0 2 4 6 1 3 5 7 from the lowest bits on
    qzeros  int32 [K/g, N/8]   zero points in the same way
    scales  float [K/g, N]

A weight is scale * (integer - zero point).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from belle_compile.compiler.checkpoint.packed.base import (
    FLOATS,
    Array,
    Indices,
    Module,
    Packing,
    Statement,
    columns,
    groups_of_inputs,
    refused,
)
from belle_compile.compiler.checkpoint.packed.bits import centred, unpacked
from belle_compile.compiler.checkpoint.tensors import LazyTensor
from belle_compile.compiler.ir.quantized import Grid, QuantizedRows, QuantizedTensor

BITS = 4
_IN_A_WORD = 8
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # the place in a word of each of its outputs
_INPUTS = 1024  # unpacked at a time


class Awq(Packing):
    """See the module's docstring."""

    method, title = "awq", "AWQ"
    marks, parts = ("qweight",), ("qweight", "qzeros", "scales")
    spare_biases = True

    def check(self, stated: Statement) -> list[str]:
        settings = stated.settings
        version = settings.get("version", settings.get("checkpoint_format", settings.get("format", "gemm")))
        if str(version).lower() != "gemm":
            raise refused(stated, self.title, f"version {version!r}", "gemm")
        bits = settings.get("bits", settings.get("w_bit", BITS))
        if bits != BITS or type(bits) is not int:
            raise refused(stated, self.title, f"{bits!r} bits", str(BITS))
        return []

    def weight(self, module: Module, stated: Statement) -> QuantizedTensor:
        qweight, qzeros = module.tensor("qweight", 2, "int32"), module.tensor("qzeros", 2, "int32")
        scales = module.tensor("scales", 2, *FLOATS)
        inputs, (groups, outputs) = qweight.shape[0], scales.shape
        if outputs % _IN_A_WORD:
            raise module.error(f"scales of shape {list(scales.shape)}", f"a multiple of {_IN_A_WORD} outputs", scales)
        module.require(qweight, (inputs, outputs // _IN_A_WORD))
        module.require(qzeros, (groups, outputs // _IN_A_WORD))
        stated_size = stated.settings.get("group_size", stated.settings.get("q_group_size"))
        size, order = groups_of_inputs(module, "g_idx", inputs, groups, stated_size)
        stored = _Stored(qweight, qzeros, scales, order)
        return QuantizedTensor((outputs, inputs), BITS, size, stored.rows, stored.grid, by_inputs=True)


@dataclass(frozen=True)
class _Stored:
    """The tensors of a module."""

    qweight: LazyTensor
    qzeros: LazyTensor
    scales: LazyTensor
    order: Indices | None

    def rows(self, start: int, stop: int) -> QuantizedRows:
        inputs = self.qweight.shape[0]
        integers = np.empty((stop - start, inputs), np.int8)
        for first in range(0, inputs, _INPUTS):
            last = min(first + _INPUTS, inputs)
            integers[:, first:last] = _outputs(self.qweight.stored(first, last), start, stop)
        grid = self._grid(start, stop)
        return QuantizedRows(integers, grid.scales, grid.zero_points, group_of=self.order)

    def grid(self) -> Grid:
        return self._grid(0, self.scales.shape[1])

    def _grid(self, start: int, stop: int) -> Grid:
        zeros = _outputs(self.qzeros.stored(0, self.qzeros.shape[0]), start, stop)
        return Grid(columns(self.scales, start, stop), zeros)


def _outputs(words: Array, start: int, stop: int) -> Array:
    """Integers of outputs start..stop, int8 [stop - start, rows], in rows of words that hold eight outputs each."""
    first, last = start // _IN_A_WORD, -(-stop // _IN_A_WORD)
    single = unpacked(words[:, first:last], BITS).reshape(len(words), last - first, _IN_A_WORD)[..., _PLACES]
    chosen = single.reshape(len(words), -1)[:, start - first * _IN_A_WORD : stop - first * _IN_A_WORD]
    return centred(chosen.T, BITS)
