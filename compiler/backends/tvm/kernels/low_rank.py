"""Changes of low rank that adapters make to the result of a linear layer, each row with the adapter of its sequence."""

from __future__ import annotations

from dataclasses import dataclass

from belle_compile.compiler.backends.program import kernels
from belle_compile.compiler.backends.tvm import tir
from belle_compile.compiler.backends.tvm.isa import Isa
from belle_compile.compiler.backends.tvm.kernels.base import Kernel
from belle_compile.compiler.backends.tvm.kernels.rowwise import Values, each
from belle_compile.compiler.backends.tvm.tir import Buffer, Expr, T
from belle_compile.runtime.program import COLUMNS, LANES, RANK_STEP, padded, rank_rows


@dataclass(frozen=True)
class LowRank(Kernel, kernels.LowRank):
    """One thread computes a row, with all sums in one order, whatever the other rows are. Rows with the same adapter lie side
    by side, so that few threads read each."""

    def body(self, isa: Isa, *buffers: Buffer) -> None:
        named = self.named(buffers)
        adapted = named["adapted"]
        tir.for_rows(tir.rows_of(adapted), lambda number: self._row(tir.bind(tir.i64(adapted[number + 1])), named))

    def _row(self, row: Expr, named: dict[str, Buffer]) -> None:
        slot = tir.i64(named["adapters"][tir.i64(named["sequences"][row])])
        factors, base = named["factors"], tir.bind(slot * self.slot)
        groups = tir.bind(tir.i64(T.cast(factors[base], "int32")))
        with tir.when(groups > tir.i64(0)):
            self._change(row, base, groups, named)

    def _change(self, row: Expr, base: Expr, groups: Expr, named: dict[str, Buffer]) -> None:
        """Add the change of `groups` of ranks, whose region begins at `base`."""
        factors, rows, width = named["factors"], rank_rows(self.rank), padded(self.inputs)
        kept, sums = tir.local(width), tir.local(padded(rows))
        if width > self.inputs:
            tir.store(kept, width - LANES, tir.splat(0.0))
        values = self._input(row, named)
        each(self.inputs, lambda c, lanes: tir.store(kept, c, values(c, lanes), lanes))
        first = tir.bind(base + padded(1))
        addend = tir.bind(first + rows * width)
        tir.for_range(groups, lambda group: self._reduce(group, first, addend, kept, sums, factors))
        second = tir.bind(addend + padded(rows))
        self._expand(row, second, tir.bind(groups * RANK_STEP), sums, named)

    def _input(self, row: Expr, named: dict[str, Buffer]) -> Values:
        """The row of x in float32."""
        start = tir.bind(self.x.row(row))
        if not self.planes:
            return lambda c, lanes: tir.load(named["x"], start + c, lanes)
        xq, scale = named["xq"], tir.bind(tir.load(named["xs"], row, 1))

        def plane(number: int, c: Expr, lanes: int) -> Expr:
            stored = tir.load(xq, start + self.x.stride // self.planes * number + c, lanes)
            return T.cast(stored, tir.int_type(lanes)) - tir.splat_i32(128, lanes)

        def values(c: Expr, lanes: int) -> Expr:
            integer = plane(0, c, lanes)
            if self.planes == 2:
                integer = integer * tir.splat_i32(256, lanes) + plane(1, c, lanes)
            return T.cast(integer, tir.float_type(lanes)) * tir.splat(scale, lanes)

        return values

    def _reduce(self, group: Expr, first: Expr, addend: Expr, kept: Buffer, sums: Buffer, factors: Buffer) -> None:
        """The products of the row and a group of rows of a, plus their addends."""
        start = tir.bind(first + group * (RANK_STEP * padded(self.inputs)))
        acc = tir.Registers(RANK_STEP, tir.F16, tir.splat(0.0))

        def step(chunk: Expr) -> None:
            value, place = tir.bind(tir.load(kept, chunk * LANES)), tir.bind(start + chunk * (RANK_STEP * LANES))
            for i in range(RANK_STEP):
                acc[i] = tir.fma(value, tir.load(factors, place + i * LANES), acc[i])

        tir.for_range(padded(self.inputs) // LANES, step)
        for i in range(RANK_STEP):
            rank = group * RANK_STEP + i
            tir.store(sums, rank, tir.reduce_lanes(acc[i], tir.add) + tir.load(factors, addend + rank, 1), 1)

    def _expand(self, row: Expr, second: Expr, ranks: Expr, sums: Buffer, named: dict[str, Buffer]) -> None:
        """Add the product of b and the sums to the row of the result."""
        out, factors, target = named["out"], named["factors"], tir.bind(self.out.row(row))

        def columns(block: Expr, first: Expr, count: int, lanes: int) -> None:
            """The columns from `first` of a block on: `count` vectors of `lanes`."""
            start, place = tir.bind(second + block * COLUMNS * ranks + first), tir.bind(target + block * COLUMNS + first)
            acc = tir.Registers(count, tir.float_type(lanes), tir.splat(0.0, lanes))

            def step(rank: Expr) -> None:
                value, row_start = tir.bind(tir.splat(sums[rank], lanes)), tir.bind(start + rank * COLUMNS)
                for i in range(count):
                    acc[i] = tir.fma(value, tir.load(factors, row_start + i * LANES, lanes), acc[i], lanes)

            tir.for_range(ranks, step)
            for i in range(count):
                at = place + i * LANES
                tir.store(out, at, tir.load(out, at, lanes) + acc[i], lanes)

        whole, rest = divmod(self.outputs, COLUMNS)
        tir.for_range(whole, lambda block: columns(block, tir.i64(0), COLUMNS // LANES, LANES))
        if rest // LANES:
            columns(tir.i64(whole), tir.i64(0), rest // LANES, LANES)
        if rest % LANES:
            tir.for_range(rest % LANES, lambda i: columns(tir.i64(whole), i + rest // LANES * LANES, 1, 1))
