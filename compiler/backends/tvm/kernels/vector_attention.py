"""Attention by vectors: keys and values of a chunk are multiplied with a few queries in registers, in float32 for every type of
cache."""

from __future__ import annotations

from belle_compile.compiler.backends.program import kernels
from belle_compile.compiler.backends.tvm import tir
from belle_compile.compiler.backends.tvm.isa import Isa
from belle_compile.compiler.backends.tvm.kernels.cache_blocks import BLOCK, as_pairs
from belle_compile.compiler.backends.tvm.kernels.flash_attention import BLOCKS, CHUNK, Chunk, FlashAttention
from belle_compile.compiler.backends.tvm.kernels.part_sums import LOWEST
from belle_compile.compiler.backends.tvm.kernels.rowwise import each
from belle_compile.compiler.backends.tvm.tir import LANES, Expr, T

FEW_BLOCKS = 2  # blocks whose scores are computed at once at the end of a context
Columns = list[tuple[int, int]]  # (first column, lanes) of vectors


class VectorAttention(FlashAttention):
    """`FlashAttention` for every instruction set and cache."""

    query_type = "float32"

    @classmethod
    def takes(cls, shape: kernels.Attention, isa: Isa, rows: int) -> bool:
        return True

    def __init__(self, shape: kernels.Attention, isa: Isa, rows: int, heads_in_turn: bool = False) -> None:
        super().__init__(shape, isa, rows, heads_in_turn)
        accumulators = 24 if isa.dot == "vnni" else 6  # of 32 registers of 16 floats, or of 16 registers of 8
        # Beside its sums, a block of keys has one register, or two where a load gives two elements of each key.
        of_block, most = self.tall + 1 + self.cache.paired, accumulators + accumulators // 4
        self.blocks_at_once = max(b for b in (1, 2, 4, 8) if b == 1 or b * of_block <= most)
        self.columns_at_once = max(1, accumulators // self.tall)

    def _at_once(self, queries: int) -> int:
        most = 8 if self.isa.dot == "vnni" else 6
        return -(-queries // -(-queries // most))

    def _allocate(self) -> None:
        self.sums = tir.local(self.queries * self.padded)
        self.scores = tir.local(self.queries * CHUNK)
        self.maxima, self.shrink = tir.local(self.queries), tir.local(self.queries)
        self.weights = tir.local(self.queries * LANES)

    def _keep_query(self, at: Expr, value: Expr, lanes: int) -> None:
        tir.store(self.q, at, value, lanes)

    def _clear(self, m: Expr) -> None:
        tir.store(self.maxima, m, T.float32(LOWEST), 1)
        tir.store(self.shrink, m, T.float32(1.0), 1)
        tir.store(self.weights, m * LANES, tir.splat(0.0))
        each(self.padded, lambda c, lanes: tir.store(self.sums, m * self.padded + c, tir.splat(0.0, lanes), lanes))

    def end(self) -> None:
        """Emit nothing."""

    def _read(self, cache: str, index: Expr, lanes: int) -> Expr:
        return tir.bind(T.cast(tir.load(self.task.named[cache], index, lanes), tir.float_type(lanes)))

    def _read_pair(self, cache: str, start: Expr, pair: Expr, lanes: int) -> tuple[Expr, Expr]:
        """The two halves of pairs of bfloat16 of the head at `start`."""
        place = T.shift_right(start, tir.i64(1)) + pair
        return tir.of_pair(tir.load(as_pairs(self.task.named[cache]), place, lanes), lanes)

    def _score(self, chunk: Chunk) -> None:
        """Emit steps of as many blocks as have sums in registers; where those are many, the last blocks are taken a few at a
        time, since a short context would multiply as much as a whole chunk."""
        wide, few = self.blocks_at_once, min(FEW_BLOCKS, self.blocks_at_once)
        whole = tir.opaque(T.floordiv(chunk.blocks, wide)) if few < wide else tir.i64(0)
        rest = tir.opaque(chunk.blocks - whole * wide)
        if few < wide:
            tir.for_range(whole, lambda step: self._score_blocks(chunk, tir.opaque(step * wide), wide))
        tir.for_range(T.floordiv(rest + (few - 1), few),
                      lambda step: self._score_blocks(chunk, tir.opaque(whole * wide + step * few), few))  # fmt: skip

    def _score_blocks(self, chunk: Chunk, block: Expr, wide: int) -> None:
        """The scores of all queries for the tokens of `wide` blocks from `block`, a number in the chunk."""
        starts = [chunk.base(block + i) for i in range(wide)]
        scales = [self.cache.scales_before(start) for start in starts] if self.cache.quantized else []
        if self.rows == 1:
            for scale in scales:
                tir.prefetch(self.value_scales, scale)
        tir.for_range(self.task.tiles, lambda tile: self._score_tile(tile, block, starts, scales))

    def _score_tile(self, tile: Expr, block: Expr, starts: list[Expr], scales_at: list[Expr]) -> None:
        """The scores of `tall` queries for the tokens of the blocks at `starts`, the first of which is number `block`, and
        whose scales lie at `scales_at`."""
        tall, wide = self.tall, len(starts)
        unroll = self.cache.line // BLOCK
        acc = tir.Registers(tall * wide, tir.F16, tir.splat(0.0))
        queries = tir.bind((self.task.first_query + tile * tall) * self.dim)

        def element(d: Expr, keys: list[Expr]) -> None:
            for m in range(tall):
                q = tir.bind(tir.splat(self.q[queries + m * self.dim + d]))
                for i, key in enumerate(keys):
                    acc[m * wide + i] = tir.fma(q, key, acc[m * wide + i])

        def line(index: Expr) -> None:
            """The elements in one cache line of keys; the values of the same tokens are fetched, which are read next."""
            if self.cache.paired:
                pairs = [self._read_pair("kcache", start, index * BLOCK, LANES) for start in starts]
                for i in range(2):
                    element(index * 2 + i, [pair[i] for pair in pairs])
            else:
                for d in (index * unroll + i for i in range(unroll)):
                    element(d, [self._read("kcache", start + d * BLOCK, LANES) for start in starts])
            if self.rows == 1:
                for start in starts:
                    tir.prefetch(self.task.named["vcache"], start + index * (unroll * BLOCK))

        tir.for_range(self.dim // unroll, line)
        for d in range(self.dim // unroll * unroll, self.dim):
            element(tir.i64(d), [self._read("kcache", start + tir.i64(d) * BLOCK, LANES) for start in starts])
        scales = [tir.bind(tir.load(self.key_scales, at)) for at in scales_at]
        for m in range(tall):
            for i in range(wide):
                target = (tile * tall + m) * CHUNK + (block + i) * BLOCK
                score = acc[m * wide + i]
                tir.store(self.scores, target, score * scales[i] if scales else score)

    def _soften(self, chunk: Chunk) -> None:
        def soften(m: Expr) -> None:
            last = self._position_in(chunk, m)
            whole = last >= CHUNK - 1
            if self.shape.window is not None:
                whole = T.And(whole, last < self.shape.window)
            pairs = tir.opaque(T.floordiv(chunk.blocks + 1, 2))
            tir.either(whole, lambda: self._soften_query(m, last, BLOCKS // 2, masked=False),
                       lambda: self._soften_query(m, last, pairs, masked=True))  # fmt: skip

        tir.for_range(self.task.used, soften)

    def _soften_query(self, m: Expr, last: Expr, pairs: Expr, masked: bool) -> None:
        """Set scores[m] of the first `pairs` pairs of blocks to exp(score - maximum) times the scale of the value, if any.

        They are 0 for tokens after `last`, and for those before the window that ends there. Blocks left out would add zeros.
        """
        line = tir.bind(m * CHUNK)
        slope = tir.bind(tir.splat(self.slopes[self.task.first_query + m])) if self.shape.alibi else None

        def visible(first: Expr, seen: Expr, hidden: Expr) -> Expr:
            return self._visible(first, last, seen, hidden) if masked else seen

        def score(first: Expr) -> Expr:
            """The scores of 16 tokens, in numbers of the chunk."""
            value = tir.load(self.scores, line + first)
            if slope is not None:  # distances instead of positions: the softmax is the same, and no number grows large
                value = value + slope * T.cast(tir.lane_numbers(first) - tir.splat(last), tir.F16)
            return tir.bind(visible(first, value, tir.splat(LOWEST)))

        highest, totals = tir.Registers(2, tir.F16, tir.splat(LOWEST)), tir.Registers(2, tir.F16, tir.splat(0.0))

        def compare(pair: Expr) -> None:
            for i in range(2):
                highest[i] = T.max(highest[i], score(tir.bind((pair * 2 + i) * LANES)))

        tir.for_range(pairs, compare)
        old = tir.bind(self.maxima[m])
        maximum = tir.bind(T.max(tir.highest_lane(T.max(highest[0], highest[1])), tir.splat(old)))
        single = tir.bind(T.Shuffle([maximum], [T.int32(0)]))

        def raise_to(pair: Expr) -> None:
            for i in range(2):
                first = tir.bind((pair * 2 + i) * LANES)
                power = tir.bind(visible(first, tir.exp(score(first) - maximum), tir.splat(0.0)))
                scale = tir.load(self.scales, first) if self.cache.quantized else None
                tir.store(self.scores, line + first, power if scale is None else power * scale)
                totals[i] = totals[i] + power

        tir.for_range(pairs, raise_to)
        shrink = tir.bind(tir.exp(old - single, 1))
        weights = tir.load(self.weights, m * LANES) * tir.splat(shrink) + (totals[0] + totals[1])
        tir.store(self.weights, m * LANES, weights)
        tir.store(self.maxima, m, single, 1)
        tir.store(self.shrink, m, shrink, 1)

    def _accumulate(self, chunk: Chunk) -> None:
        """Add the weighted values; tokens that were never written are not read."""
        every = _columns(self.dim)
        for first in range(0, len(every), self.columns_at_once):
            columns = every[first : first + self.columns_at_once]

            def tile(index: Expr, columns: Columns = columns) -> None:
                sums = _TileSums(self, index, columns)
                tir.for_range(chunk.blocks, lambda block: self._add_block(chunk, block, sums))
                sums.store()

            tir.for_range(self.task.tiles, tile)

    def _add_block(self, chunk: Chunk, block: Expr, sums: _TileSums) -> None:
        """Add a block's weighted values in some columns."""
        start, columns = chunk.base(block), sums.columns
        following = chunk.following(block) if self.rows == 1 else None
        count = tir.opaque(T.min(chunk.tokens - block * BLOCK, tir.i64(BLOCK)))

        def fetch(token: Expr, several: int) -> None:
            """The keys that are read next, as many bytes as are read here."""
            if following is not None:
                end = columns[-1][0] + columns[-1][1]
                for column in range(several * columns[0][0], several * end, self.cache.line):
                    tir.prefetch(self.task.named["kcache"], following + token * self.dim + column)

        def single(token: Expr) -> None:
            values = [self._read("vcache", start + token * self.dim + column, lanes) for column, lanes in columns]
            fetch(token, 1)
            sums.add(block, token, values)

        def pair(i: Expr, both: bool = True) -> None:
            values = [self._read_pair("vcache", start, i * self.dim + column, lanes) for column, lanes in columns]
            fetch(i * 2, 2)
            sums.add(block, i * 2, [low for low, _ in values])
            if both:
                sums.add(block, i * 2 + 1, [high for _, high in values])

        if self.cache.paired:
            tir.for_range(T.floordiv(count, 2), pair)
            with tir.when(T.floormod(count, 2) == 1):
                pair(tir.opaque(T.floordiv(count, 2)), both=False)
        else:
            tir.for_range(count, single)


class _TileSums:
    """The sums of one tile of queries in some columns of the values, in registers. They begin with those of earlier chunks,
    scaled to the new maximum."""

    def __init__(self, attention: VectorAttention, tile: Expr, columns: Columns) -> None:
        self.attention, self.columns = attention, columns
        self.first = tir.opaque(tile * attention.tall)  # the first query
        self.acc = [tir.Registers(attention.tall, tir.float_type(lanes)) for _, lanes in columns]
        for m, c, place, lanes in self._places():
            old = tir.load(attention.sums, place, lanes)
            self.acc[c][m] = old * tir.splat(attention.shrink[self.first + m], lanes)

    def _places(self) -> list[tuple[int, int, Expr, int]]:
        """(query, number of the column, index in the attention's sums, lanes)"""
        attention = self.attention
        return [(m, c, (self.first + m) * attention.padded + column, lanes)
                for m in range(attention.tall) for c, (column, lanes) in enumerate(self.columns)]  # fmt: skip

    def add(self, block: Expr, token: Expr, values: list[Expr]) -> None:
        """Add the values of one token, times its weight for each query."""
        for m in range(self.attention.tall):
            weight = tir.bind(self.attention.scores[(self.first + m) * CHUNK + block * BLOCK + token])
            for c, (_, lanes) in enumerate(self.columns):
                self.acc[c][m] = tir.fma(tir.splat(weight, lanes), values[c], self.acc[c][m], lanes)

    def store(self) -> None:
        """Write the sums back."""
        for m, c, place, lanes in self._places():
            tir.store(self.attention.sums, place, self.acc[c][m], lanes)


def _columns(dim: int) -> Columns:
    """Vectors that cover a row of V exactly: reading past it could leave the cache."""
    columns, at = [], 0
    for lanes in (16, 8, 4, 2, 1):
        while dim - at >= lanes:
            columns.append((at, lanes))
            at += lanes
    return columns
