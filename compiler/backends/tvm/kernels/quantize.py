"""Dynamic quantization of activations, one scale per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from compiler.backends.tvm import tir
from compiler.backends.tvm.isa import Isa
from compiler.backends.tvm.kernels.base import Kernel, View
from compiler.backends.tvm.kernels.rowwise import quantize_row
from compiler.backends.tvm.tir import Buffer, Expr


@dataclass(frozen=True)
class QuantizeTokens(Kernel):
    """xs[t] = absmax(x[t]) / limit, xq[t] = rint(x[t] * limit / absmax(x[t])), stored as `rowwise.quantize_row` says."""

    kind: ClassVar[str] = "quantize"
    width: int
    x: View
    out: View
    planes: int = 1

    def pointers(self) -> tuple[tuple[str, str], ...]:
        return (("rows", "int32"), ("x", "float32"), ("xq", "uint8"), ("xs", "float32"))

    def body(self, isa: Isa, *buffers: Buffer) -> None:
        rows, x, xq, xs = buffers

        def quantize(row: Expr) -> None:
            start = tir.bind(self.x.row(row))
            quantize_row(self.width, lambda c, lanes: tir.load(x, start + c, lanes), xq, self.out, row, xs, self.planes)

        tir.for_rows(tir.rows_of(rows), quantize)
