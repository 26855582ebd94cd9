"""Quantization of activations: one scale per token, or one for all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from belle_compile.compiler.backends.program.kernel import View
from belle_compile.compiler.backends.tvm import tir
from belle_compile.compiler.backends.tvm.isa import Isa
from belle_compile.compiler.backends.tvm.kernels.base import Kernel
from belle_compile.compiler.backends.tvm.kernels.rowwise import quantize_row
from belle_compile.compiler.backends.tvm.tir import Buffer, Expr


@dataclass(frozen=True)
class QuantizeTokens(Kernel):
    """xs[t] = absmax(x[t]) / limit, xq[t] = rint(x[t] * limit / absmax(x[t])), stored as `rowwise.quantize_row` says.
    With `step`, xs is given."""

    kind: ClassVar[str] = "quantize"
    width: int
    x: View
    out: View
    planes: int = 1
    step: bool = False

    def pointers(self) -> tuple[tuple[str, str], ...]:
        step = (("step", "float32"),) if self.step else ()
        return (("rows", "int32"), ("x", "float32"), *step, ("xq", "uint8"), ("xs", "float32"))

    def body(self, isa: Isa, *buffers: Buffer) -> None:
        rows, x, *step, xq, xs = buffers

        def quantize(row: Expr) -> None:
            start = tir.bind(self.x.row(row))
            quantize_row(self.width, lambda c, lanes: tir.load(x, start + c, lanes), xq, self.out, row, xs, self.planes,
                         *step)  # fmt: skip

        tir.for_rows(tir.rows_of(rows), quantize)
