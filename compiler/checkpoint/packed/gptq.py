"""GPTQ: BELLE's `.pt` files (models/gptq of its repository), AutoGPTQ and GPTQModel.

A linear of K inputs and N outputs in groups of g inputs has, for b bits::

    qweight int32 [K*b/32, N]           integers of an output, from the lowest bits on; those of 3 bits cross words
    qzeros  int32 [ceil(K/g), N*b/32]   zero points in the same way; format "gptq" stores them less 1
    scales  float [ceil(K/g), N]
    g_idx   int32 [K]                   the group of each input; BELLE's files have none
    bias    float [N]                   in some files zeros, where the model has no bias

A weight is scale * (integer - zero point). A zero point of 0 is stored less 1 as b ones; BELLE's kernel reads 2^b there,
AutoGPTQ and this module 0, which is what the weights were rounded with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from belle_compile.compiler.checkpoint.packed.base import (
    FLOATS,
    Indices,
    Module,
    Packing,
    Statement,
    columns,
    groups_of_inputs,
    refused,
)
from belle_compile.compiler.checkpoint.packed.bits import WORD, centred, unpacked
from belle_compile.compiler.checkpoint.tensors import LazyTensor
from belle_compile.compiler.ir.quantized import Grid, QuantizedRows, QuantizedTensor

BITS = (2, 3, 4, 8)
_FORMATS = ("gptq", "gptq_v2")
_BYTES = 1 << 26  # of unpacked integers at a time


class Gptq(Packing):
    """See the module's docstring."""

    method, title = "gptq", "GPTQ"
    marks, parts = ("qweight",), ("qweight", "qzeros", "scales", "g_idx")
    spare_biases = True

    def check(self, stated: Statement) -> list[str]:
        settings = stated.settings
        layout = _layout(settings)
        if layout not in _FORMATS or settings.get("is_marlin_format"):
            found = "is_marlin_format" if settings.get("is_marlin_format") else f"checkpoint_format {layout!r}"
            raise refused(stated, self.title, found, " or ".join(_FORMATS))
        bits = settings.get("bits")
        if bits is not None and (type(bits) is not int or bits not in BITS):
            raise refused(stated, self.title, f"{bits!r} bits", f"one of {', '.join(map(str, BITS))}")
        return []

    def weight(self, module: Module, stated: Statement) -> QuantizedTensor:
        settings = stated.settings
        qweight, qzeros = module.tensor("qweight", 2, "int32"), module.tensor("qzeros", 2, "int32")
        scales = module.tensor("scales", 2, *FLOATS)
        groups, outputs = scales.shape
        bits = qzeros.shape[1] * WORD / outputs
        if bits not in BITS:
            found = f"qzeros of shape {list(qzeros.shape)} and scales of shape {list(scales.shape)}, which is {bits:g} bits"
            raise module.error(found, f"{', '.join(map(str, BITS))} bits", qzeros)
        bits, rows = int(bits), qweight.shape[0]
        each = not settings.get("dynamic")  # GPTQModel's settings of single modules
        if each and bits != settings.get("bits", bits):
            raise module.error(f"{bits} bits by the shapes of qzeros and scales", f"{settings['bits']}, as the settings state")
        module.require(qzeros, (groups, outputs * bits // WORD))
        inputs = rows * WORD // bits
        if rows * WORD % bits:
            raise module.error(f"qweight of shape {list(qweight.shape)}", f"rows of whole integers of {bits} bits", qweight)
        module.require(qweight, (rows, outputs))
        if settings.get("desc_act") and "g_idx" not in module.tensors and groups > 1:
            remedy = "give the checkpoint that it was made from"
            raise module.error("desc_act, and no g_idx that says which group an input is in", "g_idx", remedy=remedy)
        size, order = groups_of_inputs(module, "g_idx", inputs, groups, settings.get("group_size") if each else None)
        stored = _Stored(qweight, qzeros, scales, bits, 0 if _layout(settings) == "gptq_v2" else 1, order)
        return QuantizedTensor((outputs, inputs), bits, size, stored.rows, stored.grid, by_inputs=True)


def _layout(settings: Any) -> Any:
    return settings.get("checkpoint_format") or settings.get("format") or "gptq"


@dataclass(frozen=True)
class _Stored:
    """The tensors of a module; zero points are stored less `less`."""

    qweight: LazyTensor
    qzeros: LazyTensor
    scales: LazyTensor
    bits: int
    less: int
    order: Indices | None

    def rows(self, start: int, stop: int) -> QuantizedRows:
        words = columns(self.qweight, start, stop)
        integers = np.empty((len(words), words.shape[1] * WORD // self.bits), np.int8)
        step = max(1, _BYTES // max(1, integers.shape[1]))
        for first in range(0, len(words), step):
            integers[first : first + step] = centred(unpacked(words[first : first + step], self.bits), self.bits)
        grid = self._grid(start, stop)
        return QuantizedRows(integers, grid.scales, grid.zero_points, group_of=self.order)

    def grid(self) -> Grid:
        return self._grid(0, self.scales.shape[1])

    def _grid(self, start: int, stop: int) -> Grid:
        groups = self.scales.shape[0]
        zeros = unpacked(self.qzeros.stored(0, groups), self.bits)[:, start:stop]
        zeros = (zeros + np.uint8(self.less)) & np.uint8((1 << self.bits) - 1)
        return Grid(columns(self.scales, start, stop), centred(zeros.T, self.bits))
