"""Kernels that copy or add whole rows."""

from __future__ import annotations

from dataclasses import dataclass

from belle_compile.compiler.backends.program import kernels
from belle_compile.compiler.backends.tvm import tir
from belle_compile.compiler.backends.tvm.isa import Isa
from belle_compile.compiler.backends.tvm.kernels.base import Kernel
from belle_compile.compiler.backends.tvm.kernels.rowwise import each
from belle_compile.compiler.backends.tvm.tir import Buffer, Expr


@dataclass(frozen=True)
class GatherRows(Kernel, kernels.GatherRows):
    """One thread copies a row."""

    def body(self, isa: Isa, *buffers: Buffer) -> None:
        rows, indices, x, out = buffers

        def gather(row: Expr) -> None:
            source = tir.bind(self.x.row(tir.i64(indices[row])))
            target = tir.bind(self.out.row(row))
            each(self.width, lambda c, lanes: tir.store(out, target + c, tir.load(x, source + c, lanes), lanes))

        tir.for_rows(tir.rows_of(rows), gather)


@dataclass(frozen=True)
class Add(Kernel, kernels.Add):
    """One thread adds a row."""

    def body(self, isa: Isa, *buffers: Buffer) -> None:
        rows, x, r, out = buffers

        def add(row: Expr) -> None:
            left, right, target = (tir.bind(view.row(row)) for view in (self.x, self.r, self.out))

            def write(c: Expr, lanes: int) -> None:
                tir.store(out, target + c, tir.load(x, left + c, lanes) + tir.load(r, right + c, lanes), lanes)

            each(self.width, write)

        tir.for_rows(tir.rows_of(rows), add)
