"""Tile products for many rows: four accumulator tiles, 32 rows or 16 rows of two planes x 32 outputs, 64 inputs a step."""

from __future__ import annotations

from collections.abc import Callable

from compiler.backends.kernel import View
from compiler.backends.tvm import tir
from compiler.backends.tvm.isa import Isa
from compiler.backends.tvm.kernels.panels import PANEL
from compiler.backends.tvm.tir import Buffer, Expr, T

TILE = 16  # rows of a tile; a row is 64 bytes
TILE_BYTES = TILE * 64


def _emit(isa: Isa, intrinsic: str, *args: Expr) -> None:
    """One tile instruction, or the C function that stands in for it in tests (`tests/.../amx_emulation.c`)."""
    if isa.emulate_amx:
        T.evaluate(T.call_extern("int32", f"belle_emulated_{intrinsic}", *args))
    else:
        T.evaluate(T.call_llvm_intrin("void", f"llvm.x86.{intrinsic}", *args))


def _configure(isa: Isa) -> None:
    """All eight tiles as 16 rows of 64 bytes; every thread of the pool has a configuration of its own."""
    config = tir.local(64, "uint8")
    for i in range(64):
        value = 1 if i == 0 else 64 if 16 <= i < 32 and i % 2 == 0 else TILE if 48 <= i < 56 else 0
        T.buffer_store(config, T.uint8(value), [tir.i64(i)])
    _emit(isa, "ldtilecfg", T.address_of(config[tir.i64(0)]))


def tile_rows(isa: Isa, rows: Expr, panels: int, depth: int, xq: Buffer, x: View, planes: int, weight: Buffer, out: Buffer,
              target: View, task_panels: int, finish: Callable[[Expr, Expr, list[Expr]], None]) -> None:  # fmt: skip
    """`finish(row, panel, int32 sums of each plane)` for every row and panel of 16 outputs; `task_panels` (even) to a parallel
    task, taken two at a time.

    Tokens are read, and sums of the one plane, or the high one, first stored where their results will be, in whole blocks
    of 32 rows: buffers hold a multiple of 32 rows. What the rows past the last contain does not matter.
    """
    halves = 2 // planes  # of a block of rows, each half a tile
    row_block_size = halves * TILE
    tokens = [(half * TILE, x.stride // planes * plane) for half in range(halves) for plane in range(planes)]

    def pair(first: Expr, width: int) -> None:
        low = tir.local(width * TILE * PANEL, "int32") if planes > 1 else None

        def row_block(block: Expr) -> None:
            row = tir.bind(block * row_block_size)
            for tile in range(2 * width):
                _emit(isa, "tilezero", T.int8(tile))

            def step(k: Expr) -> None:
                for tile, (below, plane) in enumerate(tokens):
                    start = T.address_of(xq[(row + below) * (x.stride // 4) + (x.offset + plane) // 4 + k * TILE])
                    _emit(isa, "tileloadd64", T.int8(4 + tile), start, tir.i64(x.stride))
                for p in range(width):
                    start = T.address_of(weight[(first + p) * (depth * PANEL) + k * TILE_BYTES])
                    _emit(isa, "tileloadd64", T.int8(6 + p), start, tir.i64(64))
                for tile in range(2):
                    for p in range(width):
                        _emit(isa, "tdpbusd", T.int8(tile * width + p), T.int8(4 + tile), T.int8(6 + p))

            tir.for_range(depth // 64, step)

            def place(r: Expr, p: int) -> Expr:
                return (row + r) * target.stride + target.offset + (first + p) * PANEL

            for tile, (below, plane) in enumerate(tokens):
                for p in range(width):
                    to, stride = out[place(below, p)], target.stride * 4
                    if low is not None and plane:
                        to, stride = low[tir.i64(p * TILE * PANEL)], 64
                    _emit(isa, "tilestored64", T.int8(tile * width + p), T.address_of(to), tir.i64(stride))

            def finish_row(r: Expr) -> None:
                for p in range(width):
                    sums = [T.reinterpret(tir.I16, tir.load(out, place(r, p)))]
                    sums += [tir.load(low, p * TILE * PANEL + r * PANEL)] if low is not None else []
                    finish(row + r, first + p, sums)

            tir.for_range(T.min(rows - row, tir.i64(row_block_size)), finish_row)

        tir.for_range(T.floordiv(rows + (row_block_size - 1), tir.i64(row_block_size)), row_block)

    def task(index: Expr) -> None:
        _configure(isa)
        for offset in range(0, task_panels, 2):
            first = tir.bind(index * task_panels + offset)
            with tir.when(first + 1 < tir.i64(panels)):
                pair(first, 2)
            with tir.when(first + 1 == tir.i64(panels)):
                pair(first, 1)
        _emit(isa, "tilerelease")

    tir.parallel(-(-panels // task_panels), task)
