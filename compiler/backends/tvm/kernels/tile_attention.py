"""Attention by AMX tiles over a bfloat16 cache: queries and weights of the softmax are rounded to bfloat16, sums are float32.

A tile of queries has 16 query vectors, or fewer if there are not as many. A tile of keys is one block and 32 elements of each
key, as the cache holds it. A tile of values is two blocks and 16 elements, gathered first, since the blocks are not neighbours.
Scores are in units of the logarithm to base 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from belle_compile.compiler.backends.program import kernels
from belle_compile.compiler.backends.tvm import tir
from belle_compile.compiler.backends.tvm.isa import Isa
from belle_compile.compiler.backends.tvm.kernels.cache_blocks import BLOCK, as_pairs
from belle_compile.compiler.backends.tvm.kernels.flash_attention import BLOCKS, CHUNK, Chunk, FlashAttention
from belle_compile.compiler.backends.tvm.kernels.part_sums import LOWEST, PartSums
from belle_compile.compiler.backends.tvm.kernels.rowwise import each
from belle_compile.compiler.backends.tvm.kernels.tiles import TILE, WEIGHTS, configure, emit
from belle_compile.compiler.backends.tvm.tir import LANES, Buffer, Expr, T

DEPTH = 32  # bfloat16 elements in a row of a tile, over which a product sums
SUMS = 4  # tiles 0 to 3 hold sums, the next two the left factors, the last two the right factors
SCORES = CHUNK + LANES  # floats from the scores of one query to the next: an odd number of cache lines
POWERS = CHUNK // 2 + LANES  # pairs from the weights of one query to the next: also an odd number of cache lines
HIDDEN = 2 * LOWEST  # the score of a token that a query must not attend to: its power is 0 beside any maximum
TILE_PAIRS = TILE * DEPTH // 2


class TileAttention(FlashAttention):
    """`FlashAttention` with products of tiles. Here too the result of a query does not depend on the others: each row of a tile
    is summed by itself, in the same order."""

    query_type = "uint16"
    unit = math.log2(math.e)

    @classmethod
    def takes(cls, shape: kernels.Attention, isa: Isa, rows: int) -> bool:
        return isa.amx and shape.cache_dtype == "bfloat16" and shape.head_dim % DEPTH == 0

    def __init__(self, shape: kernels.Attention, isa: Isa, rows: int, heads_in_turn: bool = False) -> None:
        super().__init__(shape, isa, rows, heads_in_turn)
        self.layout = PartSums(self.dim, tir.exp2)
        self.query_tiles = self.queries // self.tall
        self.columns = self.dim // LANES
        self.columns_at_once = SUMS // min(2, self.query_tiles)

    def _at_once(self, queries: int) -> int:
        return min(queries, TILE)

    def _allocate(self) -> None:
        configure(self.isa, self.tall)
        self.sums, self.scores = tir.local(self.queries * self.dim), tir.local(self.queries * SCORES)
        self.powers = tir.local(self.queries * POWERS, "int32")  # the weights, in pairs of tokens
        self.values = tir.local(BLOCKS // 2 * self.columns_at_once * TILE_PAIRS, "int32")
        self.maxima, self.weights = tir.local(self.queries), tir.local(self.queries * LANES)

    def _keep_query(self, at: Expr, value: Expr, lanes: int) -> None:
        assert lanes == LANES, "halves of a head are whole vectors"
        tir.store(self.q, at, self._rounded(value))

    def _rounded(self, value: Expr) -> Expr:
        """16 values rounded to bfloat16, as uint16."""
        if self.isa.emulate_amx:
            return T.cast(tir.bfloat16_bits(value), "uint16x16")
        return T.reinterpret("uint16x16", tir.pure("bfloat16x16", "llvm.x86.avx512bf16.cvtneps2bf16.512", value))

    def _clear(self, m: Expr) -> None:
        tir.store(self.maxima, m, T.float32(LOWEST), 1)

    def end(self) -> None:
        emit(self.isa, "tilerelease")

    def _each_pair(self, body: Callable[[int, int], None]) -> None:
        """Call `body(first, count)` for two tiles of queries at a time; skip at run time those that are not used."""
        for first in range(0, self.query_tiles, 2):
            count = min(2, self.query_tiles - first)
            if first == 0:
                body(first, count)
            else:
                with tir.when(self.task.used > first * self.tall):
                    body(first, count)

    def _load(self, tile: int, buffer: Buffer, start: Expr, stride: int) -> None:
        emit(self.isa, "tileloadd64", T.int8(tile), T.address_of(buffer[tir.i64(start)]), tir.i64(stride))

    def _fetch(self, cached: Buffer, start: Expr, pairs: int) -> None:
        """Prefetch keys or values that are read next, if the task reads each of them once."""
        if self.rows == 1:
            for line in range(0, pairs, LANES):
                tir.prefetch(cached, start + line, level=2)

    def _multiply(self, sums: int, left: int, right: int) -> None:
        emit(self.isa, "tdpbf16ps", T.int8(sums), T.int8(SUMS + left), T.int8(WEIGHTS + right))

    def _store(self, tile: int, buffer: Buffer, start: Expr, stride: int) -> None:
        emit(self.isa, "tilestored64", T.int8(tile), T.address_of(buffer[tir.i64(start)]), tir.i64(stride))

    def _pairs_of(self, place: Callable[[Expr], Expr], block: Expr) -> Expr:
        """`place` of a block, counted in pairs of bfloat16."""
        return T.shift_right(place(block), tir.i64(1))

    def _score(self, chunk: Chunk) -> None:
        """Compute scores, four tiles at a time."""
        keys = as_pairs(self.task.named["kcache"])

        def queries(first: int, count: int) -> None:
            wide = SUMS // count
            steps = T.floordiv(chunk.blocks + (wide - 1), wide)
            tir.for_range(steps, lambda step: self._score_blocks(chunk, keys, range(first, first + count), step))

        self._each_pair(queries)

    def _score_blocks(self, chunk: Chunk, keys: Buffer, queries: range, step: Expr) -> None:
        """Compute the scores of some tiles of queries for as many blocks as there are tiles of sums."""
        wide = SUMS // len(queries)
        starts = [tir.bind(self._pairs_of(chunk.base, step * wide + i)) for i in range(wide)]
        later = [tir.bind(self._pairs_of(chunk.following, step * wide + i)) for i in range(wide)]
        for tile in range(SUMS):
            emit(self.isa, "tilezero", T.int8(tile))
        for k in range(self.dim // DEPTH):
            for i, tile in enumerate(queries):
                at = (self.task.first_query + tile * self.tall) * self.dim + k * DEPTH
                self._load(SUMS + i, self.q, tir.bind(at), 2 * self.dim)
            for j, start in enumerate(starts):
                self._load(WEIGHTS + j % 2, keys, start + k * TILE_PAIRS, 64)
                for i in range(len(queries)):
                    self._multiply(i * wide + j, i, j % 2)
                self._fetch(keys, later[j] + k * TILE_PAIRS, TILE_PAIRS)
        for i, tile in enumerate(queries):
            for j in range(wide):
                target = tile * self.tall * SCORES + (step * wide + j) * BLOCK
                self._store(i * wide + j, self.scores, target, 4 * SCORES)

    def _soften(self, chunk: Chunk) -> None:
        """Emit one copy of the code for each number of pairs of blocks, so that empty ones take no time."""
        pairs = tir.opaque(T.floordiv(chunk.blocks + 1, 2))

        def of(count: int) -> None:
            def soften() -> None:
                tir.for_range(self.task.used, lambda m: self._soften_blocks(chunk, m, count))

            if count == BLOCKS // 2:
                soften()
            else:
                tir.either(pairs == count, soften, lambda: of(count + 1))

        of(1)

    def _soften_blocks(self, chunk: Chunk, m: Expr, pairs: int) -> None:
        """Set powers[m] to 2**(score - maximum) for the tokens of `pairs` pairs of blocks, 0 for those that the query must not
        see."""
        scores = tir.bind(m * SCORES)
        last = self._position_in(chunk, m)
        if self.shape.alibi:  # distances instead of positions: the softmax is the same, and no number grows large
            slope = tir.bind(tir.splat(self.slopes[self.task.first_query + m]))
            distances = tir.bind(T.cast(tir.lane_numbers() - tir.splat(last), tir.F16))

        def hide(v: Expr) -> None:
            place = scores + v * LANES
            visible = self._visible(v * LANES, last, tir.load(self.scores, place), tir.splat(HIDDEN))
            tir.store(self.scores, place, visible)

        def score(v: int) -> Expr:
            value = tir.load(self.scores, scores + v * LANES)
            if self.shape.alibi:
                value = tir.fma(slope, distances + tir.splat(float(v * LANES)), value)
            return tir.bind(value)

        with tir.when(last < pairs * 2 * LANES - 1):
            tir.for_range(2 * pairs, hide, start=T.max(T.floordiv(tir.i64(last) + 1, LANES), tir.i64(0)))
        if self.shape.window is not None:
            with tir.when(last >= self.shape.window):
                tir.for_range(T.floordiv(tir.i64(last) - self.shape.window + LANES, LANES), hide)
        values = [score(v) for v in range(2 * pairs)]
        maximum, shrink = self._raise(chunk, m, tir.pairwise(values, lambda a, b: tir.bind(T.max(a, b))))
        weights = [tir.bind(tir.exp2(value - maximum)) for value in values]
        for pair in range(pairs):
            self._store_powers(tir.bind(self._place_of_powers(m, pair)), weights[2 * pair], weights[2 * pair + 1])
        self._weigh(chunk, m, shrink, tir.pairwise(weights, lambda a, b: tir.bind(a + b)))

    def _raise(self, chunk: Chunk, m: Expr, highest: Expr) -> tuple[Expr, Expr]:
        """The new maximum of a query, in all lanes, and the factor that scales earlier sums; scales the sums of values."""
        old = tir.bind(tir.splat(self.maxima[m]))
        maximum = tir.bind(T.max(tir.highest_lane(highest), old))
        shrink = tir.Registers(1, tir.F16, tir.splat(0.0))
        with tir.when(chunk.fresh == 0):
            shrink[0] = tir.exp2(old - maximum)
            line = tir.bind(m * self.dim)
            each(self.dim, lambda c, lanes: tir.store(self.sums, line + c, tir.load(self.sums, line + c) * shrink[0]))
        tir.store(self.maxima, m, T.Shuffle([maximum], [T.int32(0)]), 1)
        return maximum, shrink[0]

    def _weigh(self, chunk: Chunk, m: Expr, shrink: Expr, total: Expr) -> None:
        """Scale the partial sums of a query's weights, and add to them."""

        def first() -> None:
            tir.store(self.weights, m * LANES, total)

        def further() -> None:
            tir.store(self.weights, m * LANES, tir.fma(tir.load(self.weights, m * LANES), shrink, total))

        total = tir.bind(total)
        tir.either(chunk.fresh == 1, first, further)

    def _place_of_powers(self, m: Expr, pair: int) -> Expr:
        """The index at which the weights of 32 tokens are stored."""
        return m * POWERS + pair * LANES

    def _store_powers(self, at: Expr, low: Expr, high: Expr) -> None:
        """Store the weights of 32 tokens, rounded."""
        tir.store(self.powers, at, self._rounded_pairs(low, high))

    def _rounded_pairs(self, low: Expr, high: Expr) -> Expr:
        """32 values rounded to bfloat16, in their order, as 16 int32."""
        if not self.isa.emulate_amx:
            both = tir.pure("bfloat16x32", "llvm.x86.avx512bf16.cvtne2ps2bf16.512", high, low)
            return T.reinterpret(tir.I16, both)
        halves = tir.local(2 * LANES, "uint16")
        for i, value in enumerate((low, high)):
            tir.store(halves, i * LANES, self._rounded(value))
        return tir.bind(tir.load(tir.view_as(halves, "int32"), 0))

    def _accumulate(self, chunk: Chunk) -> None:
        """Add the weighted values; tokens that were never written count as zeros."""
        steps = tir.opaque(T.floordiv(chunk.blocks + 1, 2))
        for column in range(0, self.columns, self.columns_at_once):
            wide = min(self.columns_at_once, self.columns - column)
            self._gather(chunk, column, wide)

            def queries(first: int, count: int, columns: range = range(column, column + wide)) -> None:
                self._add_products(chunk, range(first, first + count), columns, steps)

            self._each_pair(queries)

    def _add_products(self, chunk: Chunk, queries: range, columns: range, steps: Expr) -> None:
        """Add the products of the weights of some tiles of queries with the gathered values of some columns."""
        wide = len(columns)
        places = [(i * wide + j, tir.i64(tile * self.tall * self.dim + column * LANES))
                  for i, tile in enumerate(queries) for j, column in enumerate(columns)]  # fmt: skip

        def fresh() -> None:
            for tile, _ in places:
                emit(self.isa, "tilezero", T.int8(tile))

        def further() -> None:
            for tile, place in places:
                self._load(tile, self.sums, place, 4 * self.dim)

        def step(s: Expr) -> None:
            for i, tile in enumerate(queries):
                self._load(SUMS + i, self.powers, tile * self.tall * POWERS + s * LANES, 4 * POWERS)
            for j in range(wide):
                self._load(WEIGHTS + j % 2, self.values, (s * wide + j) * TILE_PAIRS, 64)
                for i in range(len(queries)):
                    self._multiply(i * wide + j, i, j % 2)

        tir.either(chunk.fresh == 1, fresh, further)
        tir.for_range(steps, step)
        for tile, place in places:
            self._store(tile, self.sums, place, 4 * self.dim)

    def _gather(self, chunk: Chunk, column: int, wide: int) -> None:
        """Copy the values of some columns of 16 elements to tiles of two blocks each, with zeros for missing tokens."""
        cached = as_pairs(self.task.named["vcache"])
        tokens, blocks, half = chunk.tokens, chunk.blocks, TILE_PAIRS // 2

        def block(b: Expr, mask: Callable[[int], Expr] | None = None) -> None:
            source = tir.bind(self._pairs_of(chunk.base, b) + column * LANES)
            target = tir.bind(T.floordiv(b, 2) * (wide * TILE_PAIRS) + T.floormod(b, 2) * half)
            later = tir.bind(self._pairs_of(chunk.following, b) + column * half)
            self._fetch(cached, later, wide * half)
            for r in range(BLOCK // 2):
                for j in range(wide):
                    pairs = tir.load(cached, source + r * self.dim + j * LANES)
                    if mask is not None:
                        pairs = T.bitwise_and(pairs, T.broadcast(mask(r), LANES))
                    tir.store(self.values, target + j * TILE_PAIRS + r * LANES, pairs)

        def zeros() -> None:
            target = tir.bind(T.floordiv(blocks, 2) * (wide * TILE_PAIRS) + half)
            for j in range(wide):
                for r in range(BLOCK // 2):
                    tir.store(self.values, target + j * TILE_PAIRS + r * LANES, T.broadcast(T.int32(0), LANES))

        whole, rest = tir.opaque(T.floordiv(tokens, BLOCK)), tir.opaque(T.floormod(tokens, BLOCK))
        tir.for_range(whole, block)
        with tir.when(rest > 0):
            block(whole, lambda r: T.Select(rest > 2 * r + 1, T.int32(-1), T.Select(rest > 2 * r, T.int32(0xFFFF), T.int32(0))))
        with tir.when(T.floormod(blocks, 2) == 1):
            zeros()
