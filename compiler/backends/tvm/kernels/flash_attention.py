"""Attention of a few query vectors over one key/value head, 128 tokens of context at a time, with a running softmax.

After Dao et al., FlashAttention (arXiv:2205.14135): scores of a chunk, the new maximum, and the sums so far scaled
down to it. Keys lie transposed in the cache (16 tokens side by side), so scores need no reduction across lanes.

The arithmetic of a query vector is the same however many others share its task: the same order of chunks, masked tokens that
add exact zeros, and `tir.fma` where the compiler could round in two ways.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from belle_compile.compiler.backends.program import kernels
from belle_compile.compiler.backends.program.kernel import round_up
from belle_compile.compiler.backends.tvm import tir
from belle_compile.compiler.backends.tvm.isa import Isa
from belle_compile.compiler.backends.tvm.kernels.cache_blocks import BLOCK, CacheBlocks, as_scales
from belle_compile.compiler.backends.tvm.kernels.part_sums import PartSums
from belle_compile.compiler.backends.tvm.kernels.rotary import rotate_head
from belle_compile.compiler.backends.tvm.kernels.rowwise import each
from belle_compile.compiler.backends.tvm.tir import LANES, Buffer, Expr, T

CHUNK = 128  # tokens between two corrections of the running maximum
BLOCKS = CHUNK // BLOCK


@dataclass(frozen=True)
class Task:
    """The rows and the key/value head that a task attends for. Query vector m is row m // group, head m % group of the group.
    Indices and counts are int64."""

    named: dict[str, Buffer]
    row: Expr  # the first row
    kv_head: Expr
    first_query: Expr  # number of query vectors of the tasks before
    first_position: Expr  # position of the first row
    table: Expr  # first entry of the sequence in the block table
    used: Expr  # number of query vectors
    final: Expr  # entry of the last block that the task reads
    tiles: Expr  # number of groups of query vectors that are computed at once
    length: Expr  # number of tokens that the last row attends to


@dataclass(frozen=True)
class Chunk:
    """128 tokens of the context, or fewer at its end."""

    start: Expr  # first token
    tokens: Expr
    blocks: Expr
    fresh: Expr  # 1 for the first chunk of a part, else 0
    base: Callable[[Expr], Expr]  # number of a block of the chunk -> the index at which it starts in either cache
    following: Callable[[Expr], Expr]  # the same for the blocks that this thread reads next


class FlashAttention(ABC):
    """Emits the code of one task: up to `rows` neighbouring rows, with all query heads of one key/value head.

    All state is on the stack of the task, except for the queries, which may have been read for several tasks at once.
    Subclasses define how scores and sums of values are computed; `sums`, `weights` (16 partial sums each) and `maxima` hold the
    softmax of each query over the chunks so far.
    """

    query_type: ClassVar[str]
    unit: ClassVar[float] = 1.0  # the factor from scores in units of the natural logarithm to the scores of the class

    sums: Buffer
    weights: Buffer
    maxima: Buffer

    @classmethod
    @abstractmethod
    def takes(cls, shape: kernels.Attention, isa: Isa, rows: int) -> bool:
        """Whether the class can compute tasks of up to `rows` rows."""

    def __init__(self, shape: kernels.Attention, isa: Isa, rows: int, heads_in_turn: bool = False) -> None:
        """With `heads_in_turn`, a thread computes a part for all heads before the next part."""
        self.shape, self.isa, self.rows, self.heads_in_turn = shape, isa, rows, heads_in_turn
        self.dim, self.group, self.cache = shape.head_dim, shape.group, CacheBlocks.of(shape)
        self.padded = round_up(self.dim, LANES)
        self.layout = PartSums(self.dim)
        self.tall = self._at_once(rows * self.group)
        self.queries = round_up(rows * self.group, self.tall)

    @abstractmethod
    def _at_once(self, queries: int) -> int:
        """The number of query vectors that are computed at once."""

    @abstractmethod
    def _allocate(self) -> None:
        """Allocate the state of the task: `sums`, `weights`, `maxima` and what the subclass needs."""

    @abstractmethod
    def _keep_query(self, at: Expr, value: Expr, lanes: int) -> None:
        """Store a part of a query, rotated and scaled."""

    @abstractmethod
    def _clear(self, m: Expr) -> None:
        """Reset the state of a query to that before the first token, as far as a fresh chunk relies on it."""

    @abstractmethod
    def _score(self, chunk: Chunk) -> None:
        """scores[m][token] = q[m] . K[token]"""

    @abstractmethod
    def _soften(self, chunk: Chunk) -> None:
        """Convert scores to weights of the softmax, with the new maximum of each query."""

    @abstractmethod
    def _accumulate(self, chunk: Chunk) -> None:
        """Scale sums[m] to the new maximum, then add the sum over tokens of weight[m][token] * V[token]."""

    @abstractmethod
    def end(self) -> None:
        """Emit the statements at the end of a task."""

    def allocate_queries(self, tasks: int = 1) -> None:
        """Allocate the query vectors of several tasks."""
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
        first_query = tir.opaque(place * self.queries)
        first_position = tir.opaque(tir.i64(named["positions"][row]))
        table = tir.opaque(tir.i64(named["sequences"][row]) * self.shape.max_blocks)
        used = tir.opaque(count * self.group)
        final = tir.opaque(table + T.floordiv(first_position + (count - 1), BLOCK))
        tiles = tir.opaque(T.floordiv(used + (self.tall - 1), self.tall))
        length = tir.opaque(first_position + count)
        self.task = Task(named, row, kv_head, first_query, first_position, table, used, final, tiles, length)
        self._allocate()
        if self.cache.quantized:
            self.key_scales, self.value_scales = as_scales(named["kcache"]), as_scales(named["vcache"])
            self.scales = tir.local(CHUNK)  # the scales of the values of a chunk
        self.totals = tir.local(self.queries * self.layout.size)

    def part(self, first: Expr, last: Expr) -> None:
        """Compute the softmax over chunks first..last-1 alone."""
        tir.for_range(self.task.tiles * self.tall, self._clear)
        tir.for_range(last - first, lambda i: self._take_chunk(first + i, first, last))

    def _take_chunk(self, index: Expr, first: Expr, last: Expr) -> None:
        """Add chunk `index` of the part first..last-1 to the softmax."""
        start = tir.opaque(index * CHUNK)
        tokens = tir.opaque(T.min(self.task.length - start, tir.i64(CHUNK)))
        entry = tir.opaque(self.task.table + index * BLOCKS)
        blocks = tir.opaque(T.floordiv(tokens + (BLOCK - 1), BLOCK))
        fresh = tir.opaque(tir.i64(index == first))
        following = self._following(index, first, last)
        chunk = Chunk(start, tokens, blocks, fresh, lambda block: self._start_of(entry + block, self.task.kv_head), following)

        def gather_scales(block: Expr) -> None:
            scales = self.cache.scales_before(chunk.base(block))
            tir.store(self.scales, block * BLOCK, tir.load(self.value_scales, scales))

        self._score(chunk)
        if self.cache.quantized:
            tir.for_range(blocks, gather_scales)
        self._soften(chunk)
        self._accumulate(chunk)

    def _start_of(self, entry: Expr, head: Expr) -> Expr:
        """The index at which the block of a table entry starts in either cache; entries after the last one repeat it, and their
        tokens are masked."""
        return self.cache.start(self.task.named["block_table"][T.min(entry, self.task.final)], head)

    def _following(self, index: Expr, first: Expr, last: Expr) -> Callable[[Expr], Expr]:
        """The starts of the blocks that this thread reads next: those of the next chunk; after the last one of a row, those of
        the next head, or of the next row where a thread goes from row to row."""
        table, kv_head = self.task.table, self.task.kv_head
        if not self.heads_in_turn:
            if self.rows == 1 and self.shape.window is None:
                return self._following_row(index)
            return lambda block: self._start_of(table + (index + 1) * BLOCKS + block, kv_head)
        more, wraps = index + 1 < last, kv_head + 1 == self.shape.num_kv_heads
        chunk = T.Select(more, index + 1, T.Select(wraps, last, first))
        head = tir.opaque(T.Select(more, kv_head, T.Select(wraps, tir.i64(0), kv_head + 1)))
        entry = tir.opaque(table + chunk * BLOCKS)
        return lambda block: self._start_of(entry + block, head)

    def _following_row(self, index: Expr) -> Callable[[Expr], Expr]:
        """The same for rows in turn: the blocks of the row, then the first ones of the next row."""
        task, named = self.task, self.task.named
        row = tir.opaque(T.min(task.row + 1, tir.rows_of(named["rows"]) - 1))
        table = tir.opaque(tir.i64(named["sequences"][row]) * self.shape.max_blocks)
        final = tir.opaque(table + T.floordiv(tir.i64(named["positions"][row]), BLOCK))

        def start(block: Expr) -> Expr:
            own = tir.opaque(task.table + (index + 1) * BLOCKS + block)
            others = tir.opaque(T.min(table + (own - task.final - 1), final))
            entry = tir.opaque(T.Select(own <= task.final, own, others))
            return self.cache.start(named["block_table"][entry], task.kv_head)

        return start

    def _position_in(self, chunk: Chunk, m: Expr) -> Expr:
        """A query's own token as int32, counted from the chunk."""
        position = self.task.first_position + T.floordiv(m, self.group)
        return tir.opaque(T.cast(position - chunk.start, "int32"), "int32")

    def _visible(self, first: Expr | int, last: Expr, seen: Expr, hidden: Expr) -> Expr:
        """For LANES tokens from `first` on, in numbers of the chunk: `seen` for those that a query with its own token at `last`
        attends to, `hidden` for others."""
        tokens, end = tir.lane_numbers(first), tir.splat(last)
        if self.shape.window is not None:
            seen = T.Select(tokens > end - tir.splat_i32(self.shape.window), seen, hidden)
        return T.Select(tokens <= end, seen, hidden)

    def save_part(self, parts: Buffer, start: Expr) -> None:
        """Write the state of every query, one `PartSums` after the other."""
        layout = self.layout

        def save(m: Expr) -> None:
            target = tir.bind(start + m * layout.size)
            each(self.padded, lambda c, lanes: tir.store(parts, target + c, tir.load(
                self.sums, m * self.padded + c, lanes), lanes))  # fmt: skip
            tir.store(parts, target + layout.weights, tir.load(self.weights, m * LANES))
            tir.store(parts, target + layout.maximum, tir.splat(self.maxima[m]))

        tir.for_range(self.task.used, save)

    def keep_part(self) -> None:
        """Set the totals to the part just computed, the first one."""
        self.save_part(self.totals, tir.i64(0))

    def add_part(self) -> None:
        """Add the part just computed to the totals."""
        layout = self.layout

        def add(m: Expr) -> None:
            sums = tir.bind(m * self.padded)
            layout.add(self.totals, tir.bind(m * layout.size), lambda v: tir.load(self.sums, sums + v * LANES),
                       tir.load(self.weights, m * LANES), tir.splat(self.maxima[m]))  # fmt: skip

        tir.for_range(self.task.used, add)

    def finish(self) -> None:
        """Write the heads to their rows, and end the task."""
        layout, task = self.layout, self.task

        def write(m: Expr) -> None:
            head = task.kv_head * self.group + T.floormod(m, self.group)
            target = tir.opaque(self.shape.out.row(task.row + T.floordiv(m, self.group)) + head * self.dim)
            layout.write_mean(self.totals, tir.bind(m * layout.size), task.named["out"], target)

        tir.for_range(task.used, write)
        self.end()
