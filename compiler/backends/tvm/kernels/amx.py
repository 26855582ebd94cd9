"""int8 products of AMX tiles for many rows: blocks of 32 rows, or 16 rows of two planes, x 2 or 3 panels, 64 inputs a step.

Up to 16 rows of one plane are a block of one tile of tokens, which takes half of the products and of the conversions.

A group of panels stays in the core's cache while the rows pass it. Tile registers are not renamed, so reading sums back at
once would stall until their products are done. Instead, the sums of a block are stored in memory and become results, one row
a step, while the products of the next block run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from belle_compile.compiler.backends.program.kernel import View
from belle_compile.compiler.backends.tvm import tir
from belle_compile.compiler.backends.tvm.isa import Isa
from belle_compile.compiler.backends.tvm.kernels.panels import PANEL
from belle_compile.compiler.backends.tvm.kernels.tiles import TILE, TILE_BYTES, TILES, configure, emit
from belle_compile.compiler.backends.tvm.kernels.tiling import LINE
from belle_compile.compiler.backends.tvm.tir import Buffer, Expr, T

TILE_SUMS = TILE * PANEL
STEP = 64  # inputs of a product
AHEAD = 2  # weights are prefetched this many steps before they are used
Finish = Callable[[Expr, Expr, list[Expr]], None]


@dataclass
class TileRows:
    """Emits `finish(row, panel, int32 sums of each plane)` for every row and panel of 16 outputs.

    Tokens are read and results written in whole blocks of `rows_of_block` rows, which is 16 or, for one plane, 32: buffers have
    room for a multiple of 32 rows, and the content of rows past the last does not matter.
    """

    isa: Isa
    panels: int
    depth: int
    xq: Buffer
    x: View
    planes: int
    weight: Buffer
    finish: Finish
    rows_of_block: int

    def __post_init__(self) -> None:
        # The one or two tiles of tokens of a block: (offset from its first row, plane)
        self.tokens = [(first, plane) for first in range(0, self.rows_of_block, TILE) for plane in range(self.planes)]

    def take(self, rows: Expr, group: int, wide: int) -> None:
        """Emit the loops: a parallel task has `group` panels and multiplies `wide` of them at a time."""
        blocks = tir.bind(T.floordiv(rows + (self.rows_of_block - 1), tir.i64(self.rows_of_block)))

        def task(index: Expr) -> None:
            configure(self.isa)
            first = tir.bind(index * group)
            last = tir.bind(T.min(first + group, tir.i64(self.panels)))
            whole = tir.bind(T.floordiv(last - first, tir.i64(wide)))
            waiting = _Waiting(self, wide)

            def row_block(block: Expr) -> None:
                row = tir.bind(block * self.rows_of_block)
                tir.for_range(whole, lambda i: self._block(row, tir.bind(first + i * wide), waiting))
                if self.panels % wide:
                    with tir.when(first + whole * wide < last):
                        self._block(row, tir.bind(first + whole * wide), _Waiting(self, self.panels % wide, at_once=True))

            tir.for_range(blocks, row_block)
            waiting.flush()
            emit(self.isa, "tilerelease")

        tir.parallel(-(-self.panels // group), task)

    def _block(self, row: Expr, panel: Expr, waiting: _Waiting) -> None:
        """The products of a block of rows with `waiting.wide` panels, while the previous block's sums become results. The first
        block of rows prefetches the weights, towards its end those of the next panels."""
        steps, wide = self.depth // STEP, waiting.wide
        turn = max(0, steps - AHEAD)
        for tile in range(len(self.tokens) * wide):
            emit(self.isa, "tilezero", T.int8(tile))

        def loops(fetches: bool, finishes: bool) -> None:
            both = self.rows_of_block // waiting.rows_of_step(steps) if finishes else 0
            cuts = sorted({0, both, turn if fetches else 0, steps})
            for begin, end in itertools.pairwise(cuts):
                ahead = AHEAD * TILE_BYTES + (begin >= turn) * (wide - 1) * self.depth * PANEL

                def step(k: Expr, finish: bool = begin < both, ahead: int = ahead) -> None:
                    if finish:
                        waiting.finish_some(k)
                    if fetches:
                        self._fetch(panel, k, wide, ahead)
                    self._step(row, panel, k, wide)

                tir.for_range(end, step, begin)

        def either_loops(fetches: bool) -> None:
            if waiting.at_once:
                loops(fetches, False)
            else:
                tir.either(waiting.any, lambda: loops(fetches, True), lambda: loops(fetches, False))

        tir.either(row == 0, lambda: either_loops(True), lambda: either_loops(False))
        waiting.store(row, panel)

    def _fetch(self, panel: Expr, k: Expr, wide: int, ahead: int) -> None:
        """Prefetch the weights of a later step."""
        for p in range(wide):
            start = tir.bind((panel + p) * (self.depth * PANEL) + k * TILE_BYTES + ahead)
            for line in range(0, TILE_BYTES, LINE):
                tir.prefetch(self.weight, start + line)

    def _step(self, row: Expr, panel: Expr, k: Expr, wide: int) -> None:
        """One product for each tile of tokens and panel. Sums are in the first tiles; then come the tiles of tokens and
        those of weights, as many as there are or as the sums leave."""
        sums = len(self.tokens) * wide
        token_tiles = min(len(self.tokens), TILES - sums - 1)
        weight_tiles = min(wide, TILES - sums - token_tiles)
        loaded = -1
        for half, (below, plane) in enumerate(self.tokens):
            tokens = sums + half % token_tiles
            place = (
                (row + below) * (self.x.stride // 4) + (self.x.offset + self.x.stride // self.planes * plane) // 4 + k * TILE
            )
            emit(self.isa, "tileloadd64", T.int8(tokens), T.address_of(self.xq[place]), tir.i64(self.x.stride))
            for p in range(wide) if half == 0 else reversed(range(wide)):
                weights = sums + token_tiles + p % weight_tiles
                if p != loaded and (half == 0 or weight_tiles < wide):
                    start = T.address_of(self.weight[(panel + p) * (self.depth * PANEL) + k * TILE_BYTES])
                    emit(self.isa, "tileloadd64", T.int8(weights), start, tir.i64(64))
                loaded = p
                emit(self.isa, "tdpbusd", T.int8(half * wide + p), T.int8(tokens), T.int8(weights))


class _Waiting:
    """The sums of a block, which wait in memory until they become results."""

    def __init__(self, work: TileRows, wide: int, at_once: bool = False) -> None:
        self.work, self.wide, self.at_once = work, wide, at_once
        self.sums = tir.local(len(work.tokens) * wide * TILE_SUMS, "int32")
        if not at_once:
            self._row, self._panel = tir.scalar(tir.i64(-1), "int64"), tir.scalar(tir.i64(0), "int64")

    @property
    def any(self) -> Expr:
        """Whether sums are waiting."""
        return self._row[0] >= 0

    def rows_of_step(self, steps: int) -> int:
        """The number of rows to finish in each of the first steps of the next block."""
        rows = 1
        while rows * steps < self.work.rows_of_block:
            rows *= 2
        return rows

    def finish_some(self, step: Expr) -> None:
        """Finish the rows that are due in a step."""
        count = self.rows_of_step(self.work.depth // STEP)
        for i in range(count):
            self._finish(step * count + i, self._row[0], self._panel[0])

    def flush(self) -> None:
        """Finish all rows, if any are waiting."""
        with tir.when(self.any):
            tir.for_range(self.work.rows_of_block, lambda r: self._finish(r, self._row[0], self._panel[0]))

    def store(self, row: Expr, panel: Expr) -> None:
        """Store the sums of the tile registers; with `at_once`, convert them to results."""
        for tile in range(len(self.work.tokens) * self.wide):
            to = T.address_of(self.sums[tir.i64(tile * TILE_SUMS)])
            emit(self.work.isa, "tilestored64", T.int8(tile), to, tir.i64(64))
        if self.at_once:
            tir.for_range(self.work.rows_of_block, lambda r: self._finish(r, row, panel))
        else:
            self._row[0], self._panel[0] = row, panel

    def _finish(self, r: Expr, row: Expr, panel: Expr) -> None:
        """Finish row `r` of a block. First come the tiles of the first 16 rows or of the high plane, then the others."""
        planes = self.work.planes
        tile = T.floordiv(r, tir.i64(TILE)) if planes == 1 else tir.i64(0)
        place = tir.bind(tile * (self.wide * TILE_SUMS) + T.floormod(r, tir.i64(TILE)) * PANEL)
        for p in range(self.wide):
            sums = [tir.load(self.sums, place + (plane * self.wide + p) * TILE_SUMS) for plane in range(planes)]
            self.work.finish(row + r, panel + p, sums)
