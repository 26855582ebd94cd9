"""Causal attention over the paged cache: how the rows of a step are divided into tasks of flash_attention.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from belle_compile.compiler.backends.program import kernels
from belle_compile.compiler.backends.tvm import tir
from belle_compile.compiler.backends.tvm.isa import Isa
from belle_compile.compiler.backends.tvm.kernels.base import Kernel
from belle_compile.compiler.backends.tvm.kernels.flash_attention import CHUNK, FlashAttention
from belle_compile.compiler.backends.tvm.kernels.pair_attention import PairAttention
from belle_compile.compiler.backends.tvm.kernels.part_sums import PartSums
from belle_compile.compiler.backends.tvm.kernels.tile_attention import TileAttention
from belle_compile.compiler.backends.tvm.kernels.vector_attention import VectorAttention
from belle_compile.compiler.backends.tvm.tir import Buffer, Expr, T

FEW_ROWS = 4  # for up to this many rows, each part of a context is a task, so that few heads still keep all threads busy
PARTS = 32  # the most tasks of one row: enough for as many threads, and to balance the load of fewer
PARTS_BYTES = 1 << 20  # bytes of stack for the results of parts
TILE_QUERIES = 32  # query vectors that share a load of K and V when a prompt is read
PARALLEL_FROM = 1 << 15  # one thread reads fewer elements of K and V than these before others would have woken


@dataclass(frozen=True)
class Attention(Kernel, kernels.Attention):
    """Rows are computed one by one, except neighbours that are consecutive positions of one sequence (a prompt): these form
    tiles, which share every load of K and V.

    A context is cut into parts that depend on its length alone, and these are added up in their order. Therefore a token gets
    the same bits whether it is decoded alone or in a batch, verified as a draft, or read in a prompt.
    """

    kind: ClassVar[str] = "attention"

    @property
    def tile_rows(self) -> int:
        """Rows of a full tile."""
        return max(4, TILE_QUERIES // self.group)

    def body(self, isa: Isa, *buffers: Buffer) -> None:
        named = self.named(buffers)
        rows = tir.rows_of(named["rows"])
        tir.either(rows <= FEW_ROWS, lambda: self._few_rows(isa, rows, named), lambda: self._many_rows(isa, rows, named))

    @property
    def most_parts(self) -> int:
        """The largest number of parts that a context is cut into."""
        bytes_of_one = 4 * FEW_ROWS * self.num_heads * PartSums(self.head_dim).size
        return max(1, min(PARTS // self.num_kv_heads, PARTS_BYTES // bytes_of_one))

    def _flash(self, isa: Isa, rows: int, heads_in_turn: bool = False) -> FlashAttention:
        """The code of a task of up to `rows` rows, in the fastest way that can compute it."""
        kinds: tuple[type[FlashAttention], ...] = (PairAttention, TileAttention, VectorAttention)
        return next(kind for kind in kinds if kind.takes(self, isa, rows))(self, isa, rows, heads_in_turn)

    def _few_rows(self, isa: Isa, rows: Expr, named: dict[str, Buffer]) -> None:
        """Decode: every part of a (row, kv head) is a task; then the parts of each query are added up."""
        parts, tokens = self._measure(rows, named)
        flash = self._flash(isa, 1, heads_in_turn=True)
        size = self.group * flash.layout.size
        saved = tir.local(FEW_ROWS * self.num_kv_heads * self.most_parts * size)
        flash.allocate_queries(FEW_ROWS * self.num_kv_heads)

        def read(pair: Expr) -> None:
            row, kv_head = tir.opaque(T.floordiv(pair, self.num_kv_heads)), tir.opaque(T.floormod(pair, self.num_kv_heads))
            flash.read_queries(named, row, tir.i64(1), kv_head, pair)

        def task(index: Expr) -> None:
            """Emit the task of one part; heads are innermost, since they are neighbours in the cache."""
            turn, kv_head = tir.opaque(T.floordiv(index, self.num_kv_heads)), tir.opaque(T.floormod(index, self.num_kv_heads))
            row, part = tir.opaque(T.floordiv(turn, parts)), tir.opaque(T.floormod(turn, parts))
            extent = self._extent(named, row)
            with tir.when(part < extent.parts):
                flash.start(named, row, tir.i64(1), kv_head, tir.opaque(row * self.num_kv_heads + kv_head))
                flash.part(*extent.part(part))
                flash.save_part(saved, index * size)
                flash.end()

        def merge(index: Expr) -> None:
            self._merge_head(index, named, flash.layout, saved, parts)

        tir.for_range(rows * self.num_kv_heads, read)
        tasks, heads = tir.opaque(rows * self.num_kv_heads * parts), tir.opaque(rows * self.num_heads)
        work = tir.opaque(tokens[0] * (2 * self.num_kv_heads * self.head_dim))

        def alone() -> None:
            tir.for_range(tasks, task)
            tir.for_range(heads, merge)

        def together() -> None:
            tir.parallel(tasks, task)
            tir.parallel(heads, merge)

        tir.either(work < PARALLEL_FROM, alone, together)

    def _measure(self, rows: Expr, named: dict[str, Buffer]) -> tuple[Expr, tir.Registers]:
        """The most parts that a row's context is cut into, and the sum of the lengths of all contexts."""
        most, tokens = tir.scalar(tir.i64(1), "int64"), tir.scalar(tir.i64(0), "int64")

        def measure(row: Expr) -> None:
            most[0] = T.max(most[0], self._extent(named, row).parts)
            context = tir.i64(named["positions"][row]) + 1
            tokens[0] = tokens[0] + (context if self.window is None else T.min(context, tir.i64(self.window)))

        tir.for_range(rows, measure)
        return tir.opaque(most[0]), tokens

    def _merge_head(self, index: Expr, named: dict[str, Buffer], layout: PartSums, saved: Buffer, parts: Expr) -> None:
        """Write the mean over the saved parts of a query head; `index` counts query heads, row by row."""
        size = self.group * layout.size
        row, head = tir.opaque(T.floordiv(index, self.num_heads)), tir.opaque(T.floormod(index, self.num_heads))
        kv_head, member = tir.opaque(T.floordiv(head, self.group)), tir.opaque(T.floormod(head, self.group))
        start = tir.opaque((row * parts * self.num_kv_heads + kv_head) * size + member * layout.size)
        total = tir.local(layout.size)
        layout.clear(total, tir.i64(0))
        tir.for_range(self._extent(named, row).parts, lambda part: layout.add_saved(
            total, tir.i64(0), saved, tir.opaque(start + part * (self.num_kv_heads * size))))  # fmt: skip
        target = tir.opaque(self.out.row(row) + head * self.head_dim)
        layout.write_mean(total, tir.i64(0), named["out"], target)

    def _many_rows(self, isa: Isa, rows: Expr, named: dict[str, Buffer]) -> None:
        """Emit the tasks for many rows. Heads are outermost, so that a thread keeps its K and V in cache; then come rows, short
        and long contexts alternating."""
        tile = self.tile_rows
        groups = tir.opaque(T.floordiv(rows + (tile - 1), tile))
        single, tiled = self._flash(isa, 1), self._flash(isa, tile)

        def attend(flash: FlashAttention, row: Expr, count: Expr, kv_head: Expr) -> None:
            flash.allocate_queries()
            flash.read_queries(named, row, count, kv_head, tir.i64(0))
            flash.start(named, row, count, kv_head, tir.i64(0))
            extent = self._extent(named, row + count - 1)

            def add(part: Expr) -> None:
                flash.part(*extent.part(part))
                tir.either(part == 0, flash.keep_part, flash.add_part)

            tir.for_range(extent.parts, add)
            flash.finish()

        def task(index: Expr) -> None:
            """Compute the tile that begins at a row, if one does."""
            kv_head = tir.opaque(T.floordiv(index, groups * tile))
            turn = tir.opaque(T.floordiv(T.floormod(index, groups * tile), tile))
            group = tir.opaque(T.if_then_else(T.floormod(turn, 2) == 0, T.floordiv(turn, 2), groups - 1 - T.floordiv(turn, 2)))
            row = tir.opaque(group * tile + T.floormod(index, tile))
            with tir.when(row < rows), tir.when(self._joins(named, row) == 0):
                count = tir.scalar(tir.i64(1), "int64")

                def extend(step: Expr) -> None:
                    with tir.when(count[0] == step), tir.when(row + step < rows):
                        count[0] = step + self._joins(named, row + step)

                tir.for_range(tile - 1, lambda i: extend(i + 1))
                tir.either(count[0] == 1, lambda: attend(single, row, tir.i64(1), kv_head),
                           lambda: attend(tiled, row, count[0], kv_head))  # fmt: skip

        tir.parallel(groups * (tile * self.num_kv_heads), task)

    def _joins(self, named: dict[str, Buffer], row: Expr) -> Expr:
        """1 if a row belongs to the tile of the previous row, else 0. All rows of a tile have the same first chunk, and
        parts of the same length."""
        sequences, positions = named["sequences"], named["positions"]
        answer = tir.scalar(tir.i64(0), "int64")
        with tir.when(T.floormod(row, self.tile_rows) != 0), tir.when(sequences[row] == sequences[row - 1]):
            extent, before = self._extent(named, row), self._extent(named, row - 1)
            alike = extent.chunks_of_part == before.chunks_of_part
            with tir.when(alike if self.window is None else T.And(alike, extent.first == before.first)):
                answer[0] = tir.i64(positions[row] == positions[row - 1] + 1)
        return answer[0]

    def _extent(self, named: dict[str, Buffer], row: Expr) -> Extent:
        position = tir.i64(named["positions"][row])
        end, first = tir.opaque(T.floordiv(position + CHUNK, CHUNK)), tir.i64(0)
        if self.window is not None:
            first = tir.opaque(T.floordiv(T.max(position - (self.window - 1), tir.i64(0)), CHUNK))
        return Extent(first, end, tir.opaque(T.floordiv(end - first + (self.most_parts - 1), self.most_parts)))


@dataclass(frozen=True)
class Extent:
    """The context of a row: the first of its chunks and the one after its last, and how many of them make a part."""

    first: Expr
    end: Expr
    chunks_of_part: Expr

    @property
    def parts(self) -> Expr:
        """The number of parts; the last may be shorter."""
        return tir.opaque(T.floordiv(self.end - self.first + (self.chunks_of_part - 1), self.chunks_of_part))

    def part(self, index: Expr) -> tuple[Expr, Expr]:
        """The first chunk of a part, and the chunk after its last."""
        first = tir.opaque(self.first + index * self.chunks_of_part)
        return first, tir.opaque(T.min(first + self.chunks_of_part, self.end))
