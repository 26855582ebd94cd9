"""Causal attention over the paged cache: how the rows of a step become tasks of flash_attention.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from compiler.backends.tvm import tir
from compiler.backends.tvm.isa import Isa
from compiler.backends.tvm.kernels.base import Kernel, View
from compiler.backends.tvm.kernels.flash_attention import CHUNK, FlashAttention, merge
from compiler.backends.tvm.tir import Buffer, Expr, T

FEW_ROWS = 4  # up to here the context is split, so that few heads still keep all threads busy
PARTS = 64  # tasks wanted then: enough for as many threads, and to even out unequal shares of fewer
TILE_QUERIES = 32  # query vectors that pass one load of K and V when a prompt is read
PARALLEL_FROM_BYTES = 1 << 16  # of K and V to read; below, one thread is done before the others wake


@dataclass(frozen=True)
class Attention(Kernel):
    """out[t] = softmax(scale * q[t] . K (+ slope * position of the key)) V over positions 0..positions[t] of its sequence.

    Rows are taken one by one, unless neighbours are consecutive positions of one sequence (a prompt): those form
    tiles that share every load of K and V.
    """

    kind: ClassVar[str] = "attention"
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    q: View
    out: View
    max_blocks: int
    cache_dtype: str
    rotary: bool
    alibi: bool

    @property
    def group(self) -> int:
        """Query heads that share a key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def tile_rows(self) -> int:
        """Rows of a full tile."""
        return max(4, TILE_QUERIES // self.group)

    def pointers(self) -> tuple[tuple[str, str], ...]:
        cos_sin = (("cos_sin", "float32"),) if self.rotary else ()
        slopes = (("slopes", "float32"),) if self.alibi else ()
        return (("rows", "int32"), ("q", "float32"), ("positions", "int32"), ("sequences", "int32"),
                ("block_table", "int32"), *cos_sin, *slopes, ("kcache", self.cache_dtype), ("vcache", self.cache_dtype),
                ("out", "float32"))  # fmt: skip

    def body(self, isa: Isa, *buffers: Buffer) -> None:
        named = dict(zip((name for name, _ in self.pointers()), buffers, strict=True))
        rows = tir.rows_of(named["rows"])
        tir.either(rows <= FEW_ROWS, lambda: self._few_rows(isa, rows, named), lambda: self._many_rows(isa, rows, named))

    def _few_rows(self, isa: Isa, rows: Expr, named: dict[str, Buffer]) -> None:
        """Decode: every (row, kv head) is split along its context; the calling thread merges the parts."""
        longest = tir.scalar(tir.i64(0), "int64")
        tir.for_range(rows, lambda row: longest.__setitem__(0, T.max(longest[0], _chunks(named, row))))
        pairs = tir.bind(rows * self.num_kv_heads)
        splits = tir.opaque(T.max(T.min(T.floordiv(tir.i64(PARTS), pairs), longest[0]), tir.i64(1)))
        flash = FlashAttention(self, isa, 1)
        size = self.group * flash.part_stride
        parts = tir.local(max(PARTS, FEW_ROWS * self.num_kv_heads) * size)

        def task(index: Expr) -> None:
            pair, split = tir.opaque(T.floordiv(index, splits)), tir.opaque(T.floormod(index, splits))
            row, kv_head = tir.opaque(T.floordiv(pair, self.num_kv_heads)), tir.opaque(T.floormod(pair, self.num_kv_heads))
            chunks = _chunks(named, row)
            flash.start(named, row, tir.i64(1), kv_head)
            first, last = (tir.opaque(T.floordiv((split + i) * chunks, splits)) for i in range(2))
            tir.for_range(last - first, lambda i: flash.chunk(first + i))
            flash.save_parts(parts, index * size)

        def merge_head(index: Expr) -> None:
            """`index` counts query heads, row by row."""
            pair, member = tir.opaque(T.floordiv(index, self.group)), tir.opaque(T.floormod(index, self.group))
            row, head = tir.opaque(T.floordiv(index, self.num_heads)), tir.opaque(T.floormod(index, self.num_heads))
            start = tir.opaque(pair * splits * size + member * flash.part_stride)
            merge(self.head_dim, parts, start, splits, size, named["out"], self.out.row(row) + head * self.head_dim)

        tasks = tir.opaque(pairs * splits)
        chunk_bytes = 2 * CHUNK * self.num_kv_heads * self.head_dim * 4
        if chunk_bytes < PARALLEL_FROM_BYTES:
            work = tir.opaque(rows * longest[0] * chunk_bytes)
            tir.either(work < PARALLEL_FROM_BYTES, lambda: tir.for_range(tasks, task), lambda: tir.parallel(tasks, task))
        else:
            tir.parallel(tasks, task)
        tir.for_range(rows * self.num_heads, merge_head)

    def _many_rows(self, isa: Isa, rows: Expr, named: dict[str, Buffer]) -> None:
        """Heads outermost, so that a thread keeps its K and V in cache; then rows, short and long contexts in turns."""
        tile = self.tile_rows
        groups = tir.opaque(T.floordiv(rows + (tile - 1), tile))
        single, tiled = FlashAttention(self, isa, 1), FlashAttention(self, isa, tile)

        def attend(flash: FlashAttention, row: Expr, count: Expr, kv_head: Expr) -> None:
            flash.start(named, row, count, kv_head)
            tir.for_range(_chunks(named, row + count - 1), flash.chunk)
            flash.finish()

        def task(index: Expr) -> None:
            """The tile that begins at a row, if one does."""
            kv_head = tir.opaque(T.floordiv(index, groups * tile))
            turn = tir.opaque(T.floordiv(T.floormod(index, groups * tile), tile))
            group = tir.opaque(T.if_then_else(T.floormod(turn, 2) == 0, T.floordiv(turn, 2), groups - 1 - T.floordiv(turn, 2)))
            row = tir.opaque(group * tile + T.floormod(index, tile))
            with tir.when(row < rows), tir.when(_joins(named, row, tile) == 0):
                count = tir.scalar(tir.i64(1), "int64")

                def extend(step: Expr) -> None:
                    with tir.when(count[0] == step), tir.when(row + step < rows):
                        count[0] = step + _joins(named, row + step, tile)

                tir.for_range(tile - 1, lambda i: extend(i + 1))
                tir.either(count[0] == 1, lambda: attend(single, row, tir.i64(1), kv_head),
                           lambda: attend(tiled, row, count[0], kv_head))  # fmt: skip

        tir.parallel(groups * (tile * self.num_kv_heads), task)


def _joins(named: dict[str, Buffer], row: Expr, tile: int) -> Expr:
    """1 if a row goes into the tile of the row before it, else 0."""
    sequences, positions = named["sequences"], named["positions"]
    answer = tir.scalar(tir.i64(0), "int64")
    with tir.when(T.floormod(row, tile) != 0), tir.when(sequences[row] == sequences[row - 1]):
        answer[0] = tir.i64(positions[row] == positions[row - 1] + 1)
    return answer[0]


def _chunks(named: dict[str, Buffer], row: Expr) -> Expr:
    """Chunks of context that a row sees."""
    return tir.opaque(T.floordiv(tir.i64(named["positions"][row]) + CHUNK, CHUNK))
