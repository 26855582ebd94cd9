"""Attention of few query vectors on processors with AMX: vectors compute the sums of tile products, in the same order.

A tile with one to four rows is mostly empty, and values would have to be gathered for it; vectors use keys and values as they
are in the cache. A product of tiles adds up 16 products of the even elements of its rows, and 16 of the odd ones, each rounded
once, then adds both to the sum so far. This module does the same, so a token gets the same bits here as in a prompt.
"""

from __future__ import annotations

from belle_compile.compiler.backends.program import kernels
from belle_compile.compiler.backends.tvm import tir
from belle_compile.compiler.backends.tvm.isa import Isa
from belle_compile.compiler.backends.tvm.kernels.cache_blocks import BLOCK, as_pairs
from belle_compile.compiler.backends.tvm.kernels.flash_attention import CHUNK, Chunk
from belle_compile.compiler.backends.tvm.kernels.tile_attention import DEPTH, SCORES, TileAttention
from belle_compile.compiler.backends.tvm.tir import LANES, Buffer, Expr, T

MOST_QUERIES = 4
PAIRS = DEPTH // 2  # pairs of elements in a product
REGISTERS = 24  # registers that hold sums


class PairAttention(TileAttention):
    """`TileAttention` for one row with at most `MOST_QUERIES` query heads per key/value head."""

    query_type = "float32"

    @classmethod
    def takes(cls, shape: kernels.Attention, isa: Isa, rows: int) -> bool:
        return rows == 1 and shape.group <= MOST_QUERIES and super().takes(shape, isa, rows)

    def __init__(self, shape: kernels.Attention, isa: Isa, rows: int, heads_in_turn: bool = False) -> None:
        super().__init__(shape, isa, rows, heads_in_turn)
        assert self.queries == self.group, "one row"
        self.columns_at_once = min(self.columns, REGISTERS // (2 * self.queries))
        self.blocks_at_once = 4 if self.queries <= 2 else 2

    def _allocate(self) -> None:
        self.sums, self.scores = tir.local(self.queries * self.dim), tir.local(self.queries * SCORES)
        self.powers = tir.local(self.queries * CHUNK)  # for each 32 tokens, those of the even ones, then those of the odd ones
        self.maxima, self.weights = tir.local(self.queries), tir.local(self.queries * LANES)

    def end(self) -> None:
        """Emit nothing, since no tile was used."""

    def _keep_query(self, at: Expr, value: Expr, lanes: int) -> None:
        bits = T.shift_left(T.cast(self._rounded(value), tir.I16), tir.splat_i32(16))
        tir.store(self.q, at, T.reinterpret(tir.F16, bits))

    def _store_powers(self, at: Expr, low: Expr, high: Expr) -> None:
        even, odd = tir.of_pair(tir.opaque(self._rounded_pairs(low, high), tir.I16))
        tir.store(self.powers, at, even)
        tir.store(self.powers, at + LANES, odd)

    def _place_of_powers(self, m: Expr, pair: int) -> Expr:
        return m * CHUNK + pair * 2 * LANES

    def _score(self, chunk: Chunk) -> None:
        keys, wide = as_pairs(self.task.named["kcache"]), self.blocks_at_once
        queries = tir.bind(self.task.first_query * self.dim)

        def some_blocks(step: Expr) -> None:
            starts = [tir.bind(self._pairs_of(chunk.base, step * wide + i)) for i in range(wide)]
            later = [tir.bind(self._pairs_of(chunk.following, step * wide + i)) for i in range(wide)]
            places = [(m, j) for m in range(self.queries) for j in range(wide)]
            totals = tir.Registers(len(places), tir.F16, tir.splat(0.0))
            for k in range(self.dim // DEPTH):
                even, odd = (tir.Registers(len(places), tir.F16, tir.splat(0.0)) for _ in range(2))

                def pair(i: Expr, k: int = k, even: tir.Registers = even, odd: tir.Registers = odd) -> None:
                    at = tir.bind((k * PAIRS + i) * LANES)
                    lines = [tir.of_pair(tir.bind(tir.load(keys, start + at))) for start in starts]
                    for start in later:
                        self._fetch(keys, start + at, LANES)
                    for slot, (m, j) in enumerate(places):
                        q = tir.bind(queries + m * self.dim + (k * PAIRS + i) * 2)
                        even[slot] = tir.fma(tir.splat(self.q[q]), lines[j][0], even[slot])
                        odd[slot] = tir.fma(tir.splat(self.q[q + 1]), lines[j][1], odd[slot])

                tir.for_range(PAIRS, pair)
                for slot in range(len(places)):
                    totals[slot] = totals[slot] + (even[slot] + odd[slot])
            for slot, (m, j) in enumerate(places):
                tir.store(self.scores, m * SCORES + (step * wide + j) * BLOCK, totals[slot])

        tir.for_range(T.floordiv(chunk.blocks + (wide - 1), wide), some_blocks)

    def _accumulate(self, chunk: Chunk) -> None:
        """Add the weighted values; tokens that were never written are not read, since their products would be zeros."""
        values = as_pairs(self.task.named["vcache"])
        for first in range(0, self.columns, self.columns_at_once):
            columns = range(first, min(first + self.columns_at_once, self.columns))
            with tir.when(chunk.fresh == 1):
                for m in range(self.queries):
                    for column in columns:
                        tir.store(self.sums, tir.i64(m * self.dim + column * LANES), tir.splat(0.0))

            def step(index: Expr, columns: range = columns) -> None:
                self._add_two_blocks(chunk, values, index, columns)

            tir.for_range(T.floordiv(chunk.blocks + 1, 2), step)

    def _add_two_blocks(self, chunk: Chunk, values: Buffer, step: Expr, columns: range) -> None:
        """Add the weighted values of two blocks in some columns, as one product of tiles would."""
        places = [(m, column) for m in range(self.queries) for column in columns]
        even, odd = (tir.Registers(len(places), tir.F16, tir.splat(0.0)) for _ in range(2))
        self._add_block(chunk, values, (step, 0), columns, (even, odd))
        with tir.when(step * 2 + 1 < chunk.blocks):
            self._add_block(chunk, values, (step, 1), columns, (even, odd))
        for slot, (m, column) in enumerate(places):
            place = m * self.dim + column * LANES
            total = tir.bind(even[slot] + odd[slot])
            tir.store(self.sums, place, tir.load(self.sums, place) + total)

    def _add_block(self, chunk: Chunk, values: Buffer, place: tuple[Expr, int], columns: range,
                   sums: tuple[tir.Registers, tir.Registers]) -> None:  # fmt: skip
        """Add the first or second block of a step to the sums of even tokens and of odd ones, which have a register for each
        query and column."""
        (step, half), (even, odd) = place, sums
        number = tir.bind(step * 2 + half)
        start, later = (tir.bind(self._pairs_of(of, number) + columns[0] * LANES) for of in (chunk.base, chunk.following))
        count = tir.opaque(T.min(chunk.tokens - number * BLOCK, tir.i64(BLOCK)))

        def pair(i: Expr, both: bool = True) -> None:
            line, ahead = tir.bind(start + i * self.dim), tir.bind(later + i * self.dim)
            power = tir.bind(step * (2 * LANES) + half * (BLOCK // 2) + i)
            for j in range(len(columns)):
                low, high = tir.of_pair(tir.bind(tir.load(values, line + j * LANES)))
                self._fetch(values, ahead + j * LANES, LANES)
                for m in range(self.queries):
                    slot = m * len(columns) + j
                    even[slot] = tir.fma(tir.splat(self.powers[m * CHUNK + power]), low, even[slot])
                    if both:
                        odd[slot] = tir.fma(tir.splat(self.powers[m * CHUNK + power + LANES]), high, odd[slot])

        tir.for_range(T.floordiv(count, 2), pair)
        with tir.when(T.floormod(count, 2) == 1):
            pair(tir.opaque(T.floordiv(count, 2)), both=False)
