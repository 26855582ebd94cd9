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
    """xs[t] = absmax(x[t]) / 127, xq[t] = 128 + rint(x[t] * 127 / absmax(x[t]))"""

    kind: ClassVar[str] = "quantize"
    width: int
    x: View
    out: View

    def pointers(self) -> tuple[tuple[str, str], ...]:
        return (("rows", "int32"), ("x", "float32"), ("xq", "uint8"), ("xs", "float32"))

    def body(self, isa: Isa, *buffers: Buffer) -> None:
        rows, x, xq, xs = buffers

        def quantize(row: Expr) -> None:
            start = tir.bind(self.x.row(row))
            quantize_row(self.width, lambda c, lanes: tir.load(x, start + c, lanes), xq, self.out.row(row), xs, row)

        tir.for_rows(tir.rows_of(rows), quantize)
