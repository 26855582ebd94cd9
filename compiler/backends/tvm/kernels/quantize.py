"""Quantization of activations: one scale per token, or one for all of them."""

from __future__ import annotations

from dataclasses import dataclass

from belle_compile.compiler.backends.program import kernels
from belle_compile.compiler.backends.tvm import tir
from belle_compile.compiler.backends.tvm.isa import Isa
from belle_compile.compiler.backends.tvm.kernels.base import Kernel
from belle_compile.compiler.backends.tvm.kernels.rowwise import quantize_row
from belle_compile.compiler.backends.tvm.tir import Buffer, Expr


@dataclass(frozen=True)
class QuantizeTokens(Kernel, kernels.QuantizeTokens):
    """One thread quantizes a row; integers are stored as `rowwise.quantize_row` describes."""

    def body(self, isa: Isa, *buffers: Buffer) -> None:
        rows, x, *step, xq, xs = buffers

        def quantize(row: Expr) -> None:
            start = tir.bind(self.x.row(row))
            quantize_row(self.width, lambda c, lanes: tir.load(x, start + c, lanes), xq, self.out, row, xs, self.planes,
                         *step)  # fmt: skip

        tir.for_rows(tir.rows_of(rows), quantize)
