"""Changes of low rank that adapters make to the results of linear layers, each row with the adapter of its sequence."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from belle_compile.compiler.backends.program import kernels
from belle_compile.compiler.backends.tvm import tir
from belle_compile.compiler.backends.tvm.isa import Isa
from belle_compile.compiler.backends.tvm.kernels.base import Kernel
from belle_compile.compiler.backends.tvm.kernels.rowwise import Values, each
from belle_compile.compiler.backends.tvm.tir import Buffer, Expr, T
from belle_compile.runtime.program import (
    ALIGNMENT,
    BLOCK_ROWS,
    COLUMNS,
    FACTOR_BYTES,
    LANES,
    RANK_STEP,
    RegionParts,
    padded,
    rank_rows,
)

_Named = dict[str, Buffer]

# Bytes by which factors are prefetched. The parts of a region, the regions of a call's linears and those of the next call
# follow each other in a slot, so this also fetches what comes first in them. Processors do not: they prefetch within a page.
_AHEAD = 8192


@dataclass(frozen=True)
class _Part:
    """A part of the columns while code for it is emitted: `first` column and number of `outputs`, its region as float32 and as
    factors, the region's start in the adapter's slot, in bytes, and its number of groups of ranks."""

    first: int
    outputs: int
    parts: RegionParts
    floats: Buffer
    factors: Buffer
    start: Expr
    groups: Expr


@dataclass(frozen=True)
class LowRank(Kernel, kernels.LowRank):
    """One thread computes a block of rows with the same adapter. The sums of each row have one order, whatever block it is in;
    with several rows, each factor is read and converted once for all of them."""

    def body(self, isa: Isa, *buffers: Buffer) -> None:
        named = self.named(buffers)
        adapted = named["adapted"]

        def block(number: Expr) -> None:
            first = tir.bind(number * BLOCK_ROWS + 1)
            if isa.registers < 32:  # too few for the sums of several rows

                def one(i: Expr) -> None:
                    with tir.when(adapted[first + i] >= 0):
                        self._rows([first + i], named)

                tir.for_range(BLOCK_ROWS, one)
            else:
                self._sized(first, BLOCK_ROWS, named)

        tir.for_rows(tir.rows_of(adapted), block)

    def _sized(self, first: Expr, size: int, named: _Named) -> None:
        """Emit the code for a block of `size` rows or of half, a quarter, ... of them."""
        whole = partial(self._rows, [first + i for i in range(size)], named)
        if size == 1:
            whole()
        else:
            tir.either(named["adapted"][first + size // 2] < 0, lambda: self._sized(first, size // 2, named), whole)

    def _rows(self, places: list[Expr], named: _Named) -> None:
        """Change the rows at these places of `adapted`."""
        rows = [tir.bind(tir.i64(named["adapted"][place])) for place in places]
        slot = tir.bind(tir.i64(named["adapters"][tir.i64(named["sequences"][rows[0]])]) * self.slot)
        parts = [self._part(number, slot, named) for number in range(len(self.columns.parts))]
        width = padded(self.inputs)
        kept, sums = tir.local(len(rows) * width), tir.local(len(rows) * padded(rank_rows(self.rank)))
        for i, row in enumerate(rows):
            if width > self.inputs:
                tir.store(kept, (i + 1) * width - LANES, tir.splat(0.0))
            self._keep(kept, i * width, self._input(row, named))
        targets = [tir.bind(self.out.row(row)) for row in rows]
        for part in parts:
            tir.for_range(part.groups, partial(self._reduce, part=part, kept=kept, sums=sums, rows=len(rows)))
            self._expand(part, sums, targets, named["out"])

    def _part(self, number: int, slot: Expr, named: _Named) -> _Part:
        (first, outputs), floats = self.columns.parts[number], named[f"factors{number}"]
        groups = tir.bind(tir.i64(T.cast(floats[slot // 4], "int32")))
        parts = RegionParts.of(self.rank, self.inputs, outputs, self.factors)
        return _Part(first, outputs, parts, floats, tir.view_as(floats, self.factors), slot, groups)

    def _keep(self, kept: Buffer, start: int, values: Values) -> None:
        each(self.inputs, lambda c, lanes: tir.store(kept, start + c, values(c, lanes), lanes))

    def _input(self, row: Expr, named: _Named) -> Values:
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

    def _factor(self, part: _Part, index: Expr, lanes: int = LANES) -> Expr:
        """Neighbouring factors in float32."""
        return tir.bind(T.cast(tir.load(part.factors, index, lanes), tir.float_type(lanes)))

    def _prefetch(self, part: _Part, place: Expr, count: int) -> None:
        """While `count` factors are read, prefetch as many of those that follow."""
        size = FACTOR_BYTES[self.factors]
        for line in range(0, count * size, ALIGNMENT):
            tir.prefetch(part.factors, place + (_AHEAD + line) // size)

    def _reduce(self, group: Expr, part: _Part, kept: Buffer, sums: Buffer, rows: int) -> None:
        """For each row, scale * (a @ x) + addend for a group of ranks."""
        width, chunk_size = padded(self.inputs), RANK_STEP * LANES
        start = tir.bind((part.start + part.parts.a) // FACTOR_BYTES[self.factors] + group * (RANK_STEP * width))
        acc = [tir.Registers(RANK_STEP, tir.F16, tir.splat(0.0)) for _ in range(rows)]

        def step(chunk: Expr) -> None:
            place = tir.bind(start + chunk * chunk_size)
            self._prefetch(part, place, chunk_size)
            values = [tir.bind(tir.load(kept, chunk * LANES + i * width)) for i in range(rows)]
            for rank in range(RANK_STEP):
                factor = self._factor(part, place + rank * LANES)
                for row in range(rows):
                    acc[row][rank] = tir.fma(values[row], factor, acc[row][rank])

        tir.for_range(width // LANES, step)
        first, stride = tir.bind(group * RANK_STEP), padded(rank_rows(self.rank))
        scale, addend = (
            tir.bind(tir.load(part.floats, (part.start + place) // 4 + first, RANK_STEP))
            for place in (part.parts.scale, part.parts.addend)
        )
        for row in range(rows):
            totals = tir.reduce_each([acc[row][rank] for rank in range(RANK_STEP)])
            tir.store(sums, first + row * stride, tir.fma(totals, scale, addend, RANK_STEP), RANK_STEP)

    def _expand(self, part: _Part, sums: Buffer, targets: list[Expr], out: Buffer) -> None:
        """Add the products of b and each row's sums to the part of the row."""
        ranks, stride = tir.bind(part.groups * RANK_STEP), padded(rank_rows(self.rank))
        second = tir.bind((part.start + part.parts.b) // FACTOR_BYTES[self.factors])

        def columns(block: Expr, first: Expr, count: int, lanes: int) -> None:
            """The columns from `first` of a block on: `count` vectors of `lanes`."""
            start = tir.bind(second + block * COLUMNS * ranks + first)
            column = tir.bind(block * COLUMNS + first + part.first)
            acc = [tir.Registers(count, tir.float_type(lanes), tir.splat(0.0, lanes)) for _ in targets]

            def step(rank: Expr) -> None:
                values = [tir.bind(tir.splat(sums[rank + row * stride], lanes)) for row in range(len(targets))]
                place = tir.bind(start + rank * COLUMNS)
                self._prefetch(part, place, count * lanes)
                for i in range(count):
                    factor = self._factor(part, place + i * LANES, lanes)
                    for row, value in enumerate(values):
                        acc[row][i] = tir.fma(value, factor, acc[row][i], lanes)

            tir.for_range(ranks, step)
            for row, target in enumerate(targets):
                for i in range(count):
                    at = target + column + i * LANES
                    tir.store(out, at, tir.load(out, at, lanes) + acc[row][i], lanes)

        whole, rest = divmod(part.outputs, COLUMNS)
        with tir.when(part.groups > tir.i64(0)):
            tir.for_range(whole, lambda block: columns(block, tir.i64(0), COLUMNS // LANES, LANES))
            if rest // LANES:
                columns(tir.i64(whole), tir.i64(0), rest // LANES, LANES)
            if rest % LANES:
                tir.for_range(rest % LANES, lambda i: columns(tir.i64(whole), i + rest // LANES * LANES, 1, 1))
