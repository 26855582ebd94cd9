"""Layer and RMS normalization, with the residual addition before and the quantization after in the same pass; RMS normalization
of each head."""

from __future__ import annotations

from dataclasses import dataclass

from belle_compile.compiler.backends.program import kernels
from belle_compile.compiler.backends.tvm import tir
from belle_compile.compiler.backends.tvm.isa import Isa
from belle_compile.compiler.backends.tvm.kernels.base import Kernel
from belle_compile.compiler.backends.tvm.kernels.rowwise import AbsMax, Values, each, quantize_row, row_sum
from belle_compile.compiler.backends.tvm.tir import Buffer, Expr, T


@dataclass(frozen=True)
class Norm(Kernel, kernels.Norm):
    """One thread adds, normalizes and quantizes a row in one pass."""

    def body(self, isa: Isa, *buffers: Buffer) -> None:
        named = self.named(buffers)
        tir.for_rows(tir.rows_of(named["rows"]), lambda row: self._row(row, named))

    def _row(self, row: Expr, named: dict[str, Buffer]) -> None:
        normed = self._normalized(*self._input(row, named), named)
        if not self.quantize:
            target = tir.bind(self.out.row(row))
            each(self.width, lambda c, lanes: tir.store(named["out"], target + c, normed(c, lanes), lanes))
            return
        kept, highest = tir.local(self.width), None if self.step else AbsMax()

        def keep(c: Expr, lanes: int) -> None:
            value = tir.bind(normed(c, lanes))
            tir.store(kept, c, value, lanes)
            if highest:
                highest.take(value, lanes)

        each(self.width, keep)
        quantize_row(self.width, lambda c, lanes: tir.load(kept, c, lanes), named["xq"], self.out, row, named["xs"],
                     self.planes, named.get("step"), highest and highest.value())  # fmt: skip

    def _input(self, row: Expr, named: dict[str, Buffer]) -> tuple[Values, Values]:
        """The row of x, or of x + r, as a first pass reads it and as later ones do. The first pass writes `total`, if another
        kernel reads it."""
        x, start = named["x"], tir.bind(self.x.row(row))
        if self.r is None:
            return (lambda c, lanes: tir.load(x, start + c, lanes),) * 2
        r, other = named["r"], tir.bind(self.r.row(row))

        def added(c: Expr, lanes: int) -> Expr:
            return tir.load(x, start + c, lanes) + tir.load(r, other + c, lanes)

        if self.total is None:
            return added, added
        total, sums = named["total"], tir.bind(self.total.row(row))

        def written(c: Expr, lanes: int) -> Expr:
            value = tir.bind(added(c, lanes))
            tir.store(total, sums + c, value, lanes)
            return value

        return written, lambda c, lanes: tir.load(total, sums + c, lanes)

    def _normalized(self, first: Values, values: Values, named: dict[str, Buffer]) -> Values:
        width, scale, bias = self.width, named["scale"], named.get("bias")
        if self.norm == "layer":
            mean = tir.bind(row_sum(width, first) / T.float32(width))
        else:
            assert self.norm == "rms", self.norm
            mean = None

        def square(c: Expr, lanes: int) -> Expr:
            value = tir.bind(first(c, lanes) if mean is None else values(c, lanes) - tir.splat(mean, lanes))
            return value * value

        variance = row_sum(width, square) / T.float32(width)
        inverse = tir.bind(T.float32(1.0) / tir.pure("float32", "llvm.sqrt", variance + T.float32(self.epsilon)))

        def normed(c: Expr, lanes: int) -> Expr:
            value = values(c, lanes) if mean is None else values(c, lanes) - tir.splat(mean, lanes)
            value = value * tir.splat(inverse, lanes) * tir.load(scale, c, lanes)
            return value if bias is None else value + tir.load(bias, c, lanes)

        return normed


@dataclass(frozen=True)
class HeadNorm(Kernel, kernels.HeadNorm):
    """One thread normalizes the heads of a row, one after the other."""

    def body(self, isa: Isa, *buffers: Buffer) -> None:
        rows, x, scale, out = buffers
        head_dim = self.head_dim

        def normalize(row: Expr, head: Expr) -> None:
            start, target = (tir.bind(view.row(row) + head * head_dim) for view in (self.x, self.out))

            def square(c: Expr, lanes: int) -> Expr:
                value = tir.bind(tir.load(x, start + c, lanes))
                return value * value

            mean_square = row_sum(head_dim, square) / T.float32(head_dim)
            inverse = tir.bind(T.float32(1.0) / tir.pure("float32", "llvm.sqrt", mean_square + T.float32(self.epsilon)))

            def write(c: Expr, lanes: int) -> None:
                value = tir.load(x, start + c, lanes) * tir.splat(inverse, lanes) * tir.load(scale, c, lanes)
                tir.store(out, target + c, value, lanes)

            each(head_dim, write)

        def heads(row: Expr) -> None:
            tir.for_range(self.width // head_dim, lambda head: normalize(row, head))

        tir.for_rows(tir.rows_of(rows), heads)
