"""Attention of a few query vectors over one key/value head, 128 tokens of context at a time, with a running softmax.

After Dao et al., FlashAttention (arXiv:2205.14135): scores of a chunk, the new maximum, and the sums so far scaled
down to it. Keys lie transposed in the cache (16 tokens side by side), so scores need no reduction across lanes.

The arithmetic of a query vector is the same however many others share its task: the same order of chunks, masked tokens that
add exact zeros, and `tir.fma` where the compiler could round in two ways.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from belle_compile.compiler.backends.program import kernels
from belle_compile.compiler.backends.program.kernel import round_up
from belle_compile.compiler.backends.tvm import tir
from belle_compile.compiler.backends.tvm.isa import Isa
from belle_compile.compiler.backends.tvm.kernels.cache_blocks import BLOCK, CacheBlocks, as_pairs, as_scales
from belle_compile.compiler.backends.tvm.kernels.rotary import rotate_head
from belle_compile.compiler.backends.tvm.kernels.rowwise import each
from belle_compile.compiler.backends.tvm.tir import LANES, Buffer, Expr, T

CHUNK = 128  # tokens between two corrections of the running maximum
BLOCKS = CHUNK // BLOCK
LOWEST = -1.0e30  # stands for minus infinity, but differences of it are numbers


class FlashAttention:
    """Emits the code of one task: up to `rows` neighbouring rows, with all query heads of one key/value head.

    Query vector m is row m // group, head m % group of the group. All state is on the stack of the task, but for the queries,
    which several tasks may have read before.
    """

    query_type: ClassVar[str] = "float32"

    @classmethod
    def takes(cls, shape: kernels.Attention, isa: Isa, rows: int) -> bool:
        """Whether tasks of up to `rows` rows can be computed this way."""
        return True

    def __init__(self, shape: kernels.Attention, isa: Isa, rows: int, heads_in_turn: bool = False) -> None:
        """`heads_in_turn`: a thread takes a part of all heads before the next part."""
        self.heads_in_turn = heads_in_turn
        self.shape, self.rows, self.dim, self.group = shape, rows, shape.head_dim, shape.group
        wide = isa.dot == "vnni"  # 32 registers of 16 floats, else 16 of 8
        tallest, accumulators = (8, 24) if wide else (6, 6)
        queries = rows * self.group
        self.tall = -(-queries // -(-queries // tallest))  # query vectors in registers at once
        self.queries = round_up(queries, self.tall)
        self.blocks_at_once = max(b for b in (1, 2, 4, 8) if b == 1 or b * self.tall <= accumulators)
        self.columns_at_once = max(1, accumulators // self.tall)
        self.layout = PartSums(self.dim)
        self.unit = 1.0  # of scores, in units of the natural logarithm's
        self.cache = CacheBlocks.of(shape)
        self.padded = round_up(self.dim, LANES)

    def allocate_queries(self, tasks: int = 1) -> None:
        """Room for the query vectors of so many tasks."""
        self.q = tir.local(tasks * self.queries * self.dim, self.query_type)
        if self.shape.alibi:
            self.slopes = tir.local(tasks * self.queries)

    def read_queries(self, named: dict[str, Buffer], row: Expr, count: Expr, kv_head: Expr, place: Expr) -> None:
        """Rotate and scale the queries of `count` rows from `row`, those of the task at `place`."""
        shape = self.shape
        first = tir.bind(place * self.queries)
        used = tir.opaque(count * self.group)

        def read(m: Expr) -> None:
            source_row = tir.opaque(row + T.floordiv(m, self.group))
            head = tir.opaque(kv_head * self.group + T.floormod(m, self.group))
            source, target = tir.opaque(shape.q.row(source_row) + head * self.dim), tir.bind((first + m) * self.dim)

            def scaled(c: Expr, lanes: int, value: Expr) -> None:
                self._keep_query(target + c, value * tir.splat(shape.scale * self.unit, lanes), lanes)

            rotate_head(self.dim, lambda c, lanes: tir.load(named["q"], source + c, lanes), named.get("cos_sin"),
                        source_row, scaled)  # fmt: skip
            if shape.alibi:
                tir.store(self.slopes, first + m, named["slopes"][head] * T.float32(self.unit), 1)

        def pad(m: Expr) -> None:
            line = tir.bind((first + used + m) * self.dim)
            each(self.dim, lambda c, lanes: self._keep_query(line + c, tir.splat(0.0, lanes), lanes))

        tir.for_range(used, read)
        tir.for_range(T.floordiv(used + (self.tall - 1), self.tall) * self.tall - used, pad)

    def start(self, named: dict[str, Buffer], row: Expr, count: Expr, kv_head: Expr, place: Expr) -> None:
        """Begin the task whose queries were read to `place`."""
        shape = self.shape
        self.named, self.row, self.kv_head = named, row, kv_head
        self.first_query = tir.opaque(place * self.queries)
        self.first_position = tir.opaque(tir.i64(named["positions"][row]))
        self.table = tir.opaque(tir.i64(named["sequences"][row]) * shape.max_blocks)
        self.used = tir.opaque(count * self.group)
        self.final = tir.opaque(self.table + T.floordiv(self.first_position + (count - 1), BLOCK))  # its last block
        self.tiles = tir.opaque(T.floordiv(self.used + (self.tall - 1), self.tall))
        self.length = tir.opaque(self.first_position + count)  # tokens seen by the last row
        self._allocate()
        if self.cache.quantized:
            self.key_scales, self.value_scales = as_scales(named["kcache"]), as_scales(named["vcache"])
            self.scales = tir.local(CHUNK)  # of the values of a chunk
        self.totals = tir.local(self.queries * self.layout.size)

    def _allocate(self) -> None:
        """The state of the task."""
        self.sums = tir.local(self.queries * self.padded)
        self.scores = tir.local(self.queries * CHUNK)
        self.maxima, self.shrink = tir.local(self.queries), tir.local(self.queries)
        self.weights = tir.local(self.queries * LANES)  # 16 partial sums of the weights of each query

    def _keep_query(self, at: Expr, value: Expr, lanes: int) -> None:
        tir.store(self.q, at, value, lanes)

    def part(self, first: Expr, last: Expr) -> None:
        """The softmax over chunks first..last-1 alone."""
        self.first, self.last = first, last
        tir.for_range(self.tiles * self.tall, self._clear)
        tir.for_range(last - first, lambda i: self._chunk(first + i))

    def _clear(self, m: Expr) -> None:
        """No token seen yet."""
        tir.store(self.maxima, m, T.float32(LOWEST), 1)
        tir.store(self.shrink, m, T.float32(1.0), 1)
        tir.store(self.weights, m * LANES, tir.splat(0.0))
        each(self.padded, lambda c, lanes: tir.store(self.sums, m * self.padded + c, tir.splat(0.0, lanes), lanes))

    def _chunk(self, index: Expr) -> None:
        """Take the next 128 tokens in."""
        start = tir.opaque(index * CHUNK)
        tokens = tir.opaque(T.min(self.length - start, tir.i64(CHUNK)))
        first = tir.opaque(self.table + index * BLOCKS)
        blocks = tir.opaque(T.floordiv(tokens + (BLOCK - 1), BLOCK))
        self.blocks, self.fresh = blocks, tir.opaque(tir.i64(index == self.first))

        def start_of(entry: Expr, head: Expr) -> Expr:
            return self.cache.start(self.named["block_table"][T.min(entry, self.final)], head)

        def base(block: Expr) -> Expr:
            """Where a block starts in either cache, counted from the chunk; past the last one, the last again (masked)."""
            return start_of(first + block, self.kv_head)

        self.following = self._following(index, start_of)

        def gather_scales(block: Expr) -> None:
            scales = self.cache.scales_before(base(block))
            tir.store(self.scales, block * BLOCK, tir.load(self.value_scales, scales))

        self._score(blocks, base)
        if self.cache.quantized:
            tir.for_range(blocks, gather_scales)
        self._soften_all(start)
        self._accumulate(tokens, blocks, base)

    def _following(self, index: Expr, start_of: Callable[[Expr, Expr], Expr]) -> Callable[[Expr], Expr]:
        """Where the blocks start that this thread takes next: those of the next chunk, or of the next head."""
        if not self.heads_in_turn:
            return lambda block: start_of(self.table + (index + 1) * BLOCKS + block, self.kv_head)
        more, wraps = index + 1 < self.last, self.kv_head + 1 == self.shape.num_kv_heads
        chunk = T.Select(more, index + 1, T.Select(wraps, self.last, self.first))
        head = tir.opaque(T.Select(more, self.kv_head, T.Select(wraps, tir.i64(0), self.kv_head + 1)))
        entry = tir.opaque(self.table + chunk * BLOCKS)
        return lambda block: start_of(entry + block, head)

    def _read(self, cache: str, index: Expr, lanes: int) -> Expr:
        return tir.bind(T.cast(tir.load(self.named[cache], index, lanes), tir.float_type(lanes)))

    def _read_pair(self, cache: str, start: Expr, pair: Expr, lanes: int) -> tuple[Expr, Expr]:
        """Pairs of bfloat16 of the head at `start`."""
        return tir.of_pair(tir.load(as_pairs(self.named[cache]), T.shift_right(start, tir.i64(1)) + pair, lanes), lanes)

    def _score(self, blocks: Expr, base: Callable[[Expr], Expr]) -> None:
        """scores[m][token] = q[m] . K[token]"""
        tall, wide = self.tall, self.blocks_at_once
        unroll = self.cache.line // BLOCK

        def some_blocks(step: Expr) -> None:
            bases = [base(step * wide + i) for i in range(wide)]
            firsts = [self.cache.scales_before(start) for start in bases] if self.cache.quantized else []
            if self.rows == 1:
                for first in firsts:
                    tir.prefetch(self.value_scales, first)

            def tile(index: Expr) -> None:
                acc = tir.Registers(tall * wide, tir.F16, tir.splat(0.0))
                queries = tir.bind((self.first_query + index * tall) * self.dim)

                def element(d: Expr, keys: list[Expr]) -> None:
                    for m in range(tall):
                        q = tir.bind(tir.splat(self.q[queries + m * self.dim + d]))
                        for i, key in enumerate(keys):
                            acc[m * wide + i] = tir.fma(q, key, acc[m * wide + i])

                def line(step: Expr) -> None:
                    """What one cache line of keys holds; the values of the same tokens are wanted next."""
                    if self.cache.paired:
                        pairs = [self._read_pair("kcache", start, step * BLOCK, LANES) for start in bases]
                        for i in range(2):
                            element(step * 2 + i, [pair[i] for pair in pairs])
                    else:
                        for d in (step * unroll + i for i in range(unroll)):
                            element(d, [self._read("kcache", start + d * BLOCK, LANES) for start in bases])
                    if self.rows == 1:
                        for start in bases:
                            tir.prefetch(self.named["vcache"], start + step * (unroll * BLOCK))

                tir.for_range(self.dim // unroll, line)
                for d in range(self.dim // unroll * unroll, self.dim):
                    element(tir.i64(d), [self._read("kcache", start + tir.i64(d) * BLOCK, LANES) for start in bases])
                scales = [tir.bind(tir.load(self.key_scales, first)) for first in firsts]
                for m in range(tall):
                    for i in range(wide):
                        target = (index * tall + m) * CHUNK + (step * wide + i) * BLOCK
                        score = acc[m * wide + i]
                        tir.store(self.scores, target, score * scales[i] if scales else score)

            tir.for_range(self.tiles, tile)

        tir.for_range(T.floordiv(blocks + (wide - 1), wide), some_blocks)

    def _soften_all(self, start: Expr) -> None:
        """Scores of a chunk become weights, query by query."""
        tir.for_range(self.used, lambda m: self._soften(m, start))

    def _soften(self, m: Expr, start: Expr) -> None:
        """scores[m] becomes exp(score - maximum), 0 for tokens the query must not see; times the scale of the value, if any."""
        line = tir.bind(m * CHUNK)
        position = self.first_position + T.floordiv(m, self.group)
        last = tir.opaque(T.cast(position - start, "int32"), "int32")  # the query's own token, counted from the chunk

        def whole(masked: bool) -> None:
            def visible(v: int) -> Expr:
                return tir.lane_numbers(v * LANES) <= tir.splat(last)

            def score(v: int) -> Expr:
                value = tir.load(self.scores, line + v * LANES)
                if self.shape.alibi:  # by distance instead of position: softmax does not mind, and nothing grows large
                    distance = T.cast(tir.lane_numbers(v * LANES) - tir.splat(last), tir.F16)
                    value = value + tir.splat(self.slopes[self.first_query + m]) * distance
                return tir.bind(T.Select(visible(v), value, tir.splat(LOWEST)) if masked else value)

            scores = [score(v) for v in range(BLOCKS)]
            old = tir.bind(self.maxima[m])
            highest = scores
            while len(highest) > 1:
                highest = [T.max(a, b) for a, b in zip(highest[::2], highest[1::2], strict=True)]
            maximum = tir.bind(T.max(tir.reduce_lanes(highest[0], T.max), old))
            shrink = tir.bind(tir.exp(old - maximum, 1))
            powers = [tir.bind(tir.exp(value - tir.splat(maximum))) for value in scores]
            if masked:
                powers = [tir.bind(T.Select(visible(v), power, tir.splat(0.0))) for v, power in enumerate(powers)]
            for v, power in enumerate(powers):
                scale = tir.load(self.scales, v * LANES) if self.cache.quantized else None
                tir.store(self.scores, line + v * LANES, power if scale is None else power * scale)
            while len(powers) > 1:
                powers = [a + b for a, b in zip(powers[::2], powers[1::2], strict=True)]
            weights = tir.load(self.weights, m * LANES) * tir.splat(shrink) + powers[0]
            tir.store(self.weights, m * LANES, weights)
            tir.store(self.maxima, m, maximum, 1)
            tir.store(self.shrink, m, shrink, 1)

        tir.either(last >= CHUNK - 1, lambda: whole(False), lambda: whole(True))

    def _accumulate(self, tokens: Expr, blocks: Expr, base: Callable[[Expr], Expr]) -> None:
        """sums[m] = sums[m] * shrink[m] + sum over tokens of score[token] * V[token]; tokens never written are not read."""
        tall = self.tall
        columns = _columns(self.dim)
        for first in range(0, len(columns), self.columns_at_once):
            some = columns[first : first + self.columns_at_once]

            def tile(index: Expr, some: list[tuple[int, int]] = some) -> None:
                head = tir.opaque(index * tall)
                acc = [tir.Registers(tall, tir.float_type(lanes)) for _, lanes in some]
                places = [(m, c, column, lanes) for m in range(tall) for c, (column, lanes) in enumerate(some)]
                for m, c, column, lanes in places:
                    old = tir.load(self.sums, (head + m) * self.padded + column, lanes)
                    acc[c][m] = old * tir.splat(self.shrink[head + m], lanes)

                def block(b: Expr) -> None:
                    start = base(b)
                    following = self.following(b) if self.rows == 1 else None
                    count = tir.opaque(T.min(tokens - b * BLOCK, tir.i64(BLOCK)))

                    def fetch(t: Expr, several: int) -> None:
                        """The keys wanted next, as many bytes as are read here."""
                        if following is not None:
                            end = some[-1][0] + some[-1][1]
                            for column in range(several * some[0][0], several * end, self.cache.line):
                                tir.prefetch(self.named["kcache"], following + t * self.dim + column)

                    def take(t: Expr, values: list[Expr]) -> None:
                        for m in range(tall):
                            power = tir.bind(self.scores[(head + m) * CHUNK + b * BLOCK + t])
                            for c, (_, lanes) in enumerate(some):
                                acc[c][m] = tir.fma(tir.splat(power, lanes), values[c], acc[c][m], lanes)

                    def token(t: Expr) -> None:
                        values = [self._read("vcache", start + t * self.dim + column, lanes) for column, lanes in some]
                        fetch(t, 1)
                        take(t, values)

                    def pair(i: Expr, both: bool = True) -> None:
                        values = [self._read_pair("vcache", start, i * self.dim + column, lanes) for column, lanes in some]
                        fetch(i * 2, 2)
                        take(i * 2, [low for low, _ in values])
                        if both:
                            take(i * 2 + 1, [high for _, high in values])

                    if self.cache.paired:
                        tir.for_range(T.floordiv(count, 2), pair)
                        with tir.when(T.floormod(count, 2) == 1):
                            pair(tir.opaque(T.floordiv(count, 2)), both=False)
                    else:
                        tir.for_range(count, token)

                tir.for_range(blocks, block)
                for m, c, column, lanes in places:
                    tir.store(self.sums, (head + m) * self.padded + column, acc[c][m], lanes)

            tir.for_range(self.tiles, tile)

    def save_part(self, parts: Buffer, start: Expr) -> None:
        """The state of every query, one `PartSums` after the other."""
        layout = self.layout

        def save(m: Expr) -> None:
            target = tir.bind(start + m * layout.size)
            each(self.padded, lambda c, lanes: tir.store(parts, target + c, tir.load(
                self.sums, m * self.padded + c, lanes), lanes))  # fmt: skip
            tir.store(parts, target + layout.weights, tir.load(self.weights, m * LANES))
            tir.store(parts, target + layout.maximum, tir.splat(self.maxima[m]))

        tir.for_range(self.used, save)

    def keep_part(self) -> None:
        """The part just computed is the first of the totals."""
        self.save_part(self.totals, tir.i64(0))

    def add_part(self) -> None:
        """Take the part just computed into the totals."""
        layout = self.layout

        def add(m: Expr) -> None:
            sums = tir.bind(m * self.padded)
            layout.add(self.totals, tir.bind(m * layout.size), lambda v: tir.load(self.sums, sums + v * LANES),
                       tir.load(self.weights, m * LANES), tir.splat(self.maxima[m]))  # fmt: skip

        tir.for_range(self.used, add)

    def finish(self) -> None:
        """Write the heads to their rows."""
        layout, shape = self.layout, self.shape

        def write(m: Expr) -> None:
            head = self.kv_head * self.group + T.floormod(m, self.group)
            target = tir.opaque(shape.out.row(self.row + T.floordiv(m, self.group)) + head * self.dim)
            layout.write_mean(self.totals, tir.bind(m * layout.size), self.named["out"], target)

        tir.for_range(self.used, write)
        self.end()

    def end(self) -> None:
        """Nothing is left to do for the task."""


@dataclass(frozen=True)
class PartSums:
    """The softmax of a query over a part of its context: sums of weighted values, 16 partial sums of the weights, and 16 times
    the maximum that they are relative to, whose powers are of e or of 2."""

    dim: int
    power: Callable[[Expr], Expr] = tir.exp

    @property
    def weights(self) -> int:
        """Where the weights begin, in floats."""
        return round_up(self.dim, LANES)

    @property
    def maximum(self) -> int:
        """Where the maximum begins."""
        return self.weights + LANES

    @property
    def size(self) -> int:
        """Floats of one query."""
        return self.maximum + LANES

    def clear(self, total: Buffer, at: Expr) -> None:
        """No token seen yet."""
        tir.for_range(self.maximum // LANES, lambda v: tir.store(total, at + v * LANES, tir.splat(0.0)))
        tir.store(total, at + self.maximum, tir.splat(LOWEST))

    def add(self, total: Buffer, at: Expr, sums: Callable[[Expr], Expr], weights: Expr, maximum: Expr) -> None:
        """Take one part in; `sums(v)` is its v-th vector of sums."""
        weights, maximum = tir.bind(weights), tir.bind(maximum)
        old = tir.bind(tir.load(total, at + self.maximum))
        highest = tir.bind(T.max(old, maximum))
        power = tir.bind(self.power(T.min(old, maximum) - highest))
        keep = tir.bind(T.Select(old < maximum, power, tir.splat(1.0)))
        share = tir.bind(T.Select(old < maximum, tir.splat(1.0), power))

        def take(offset: Expr, value: Expr) -> None:
            tir.store(total, at + offset, tir.fma(share, value, keep * tir.load(total, at + offset)))

        tir.for_range(self.weights // LANES, lambda v: take(v * LANES, sums(v)))
        take(self.weights, weights)
        tir.store(total, at + self.maximum, highest)

    def add_saved(self, total: Buffer, at: Expr, parts: Buffer, start: Expr) -> None:
        """Take in one part that was saved."""
        self.add(total, at, lambda v: tir.load(parts, start + v * LANES), tir.load(parts, start + self.weights),
                 tir.load(parts, start + self.maximum))  # fmt: skip

    def write_mean(self, total: Buffer, at: Expr, out: Buffer, target: Expr) -> None:
        """out[target:] = sums / weights"""
        inverse = tir.bind(T.float32(1.0) / tir.reduce_lanes(tir.load(total, at + self.weights), tir.add))
        each(self.dim, lambda c, lanes: tir.store(
            out, target + c, tir.load(total, at + c, lanes) * tir.splat(inverse, lanes), lanes))  # fmt: skip


def _columns(dim: int) -> list[tuple[int, int]]:
    """(first column, lanes) of vectors that cover a row of V exactly: reading past it could leave the cache."""
    columns, at = [], 0
    for lanes in (16, 8, 4, 2, 1):
        while dim - at >= lanes:
            columns.append((at, lanes))
            at += lanes
    return columns
