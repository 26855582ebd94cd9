"""int8 linear layer: tokens quantized per row, weights per output, dequantized in the epilogue.

Weights are panels of 16 outputs: [outputs/16][inputs/4][16][4] (inputs padded with zeros to 64), which is what vpdpbusd
wants (16 outputs x 4 inputs in one register) and also the B tile of AMX. Activations are stored as uint8 = int8 + 128;
`correction[n]` = 128 * sum of the weights of output n takes the 128 out again. AVX2 has no exact unsigned product, so it
goes back to signed bytes and multiplies |a| by w with the sign of a: with |a| <= 128 and |w| <= 127 no pair sum
overflows 16 bits.

Activations of 16 bits are two planes of such bytes, a = 256 * high + low: a row has those of `high` in its first half,
those of `low` in its second. Each weight is loaded once and multiplied twice; the two sums, each exact in int32 for up
to `meanings.MAX_INPUTS` inputs, are put together in float64, which is exact too, and rounded to float32 once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from typing import ClassVar

from belle_compile.compiler.backends.program import kernels
from belle_compile.compiler.backends.program.kernel import round_up
from belle_compile.compiler.backends.tvm import tir
from belle_compile.compiler.backends.tvm.isa import Isa
from belle_compile.compiler.backends.tvm.kernels.amx import TileRows
from belle_compile.compiler.backends.tvm.kernels.base import Kernel
from belle_compile.compiler.backends.tvm.kernels.panels import PANEL, for_blocks
from belle_compile.compiler.backends.tvm.kernels.tiling import LINE, LinearTiling, Walk, built_in
from belle_compile.compiler.backends.tvm.tir import Buffer, Expr, T

INPUT_ALIGNMENT = 64


@dataclass(frozen=True)
class QuantizedLinear(Kernel, kernels.QuantizedLinear):
    """Activations are read four at a time, as int32."""

    activations = "int32"
    corrections = (("correction", "int32"),)
    tiling: LinearTiling | None = field(default=None, metadata={"named": False})  # None: the built-in one

    def body(self, isa: Isa, *buffers: Buffer) -> None:
        rows_pointer, xq, xs, weight, scale, correction, *rest = buffers
        bias, out = (rest[0], rest[1]) if self.bias else (None, rest[0])
        rows = tir.rows_of(rows_pointer)
        dot = VnniBlock if isa.dot == "vnni" else MaddubsBlock
        tiling = self.tiling or built_in(isa, self.planes)
        panels = round_up(self.outputs, PANEL) // PANEL
        depth = round_up(self.inputs, INPUT_ALIGNMENT)

        def finish(row: Expr, panel: Expr, lane: int, lanes: int, sums: list[Expr]) -> None:
            """Write `lanes` outputs of a panel from `lane` on; `sums` has one for each plane."""
            column = panel * PANEL + lane
            value = _total(sums, lanes) * tir.load(scale, column, lanes) * tir.splat(xs[row], lanes)
            if bias is not None:
                value = value + tir.load(bias, column, lanes)
            tir.store(out, row * self.out.stride + self.out.offset + column, value, lanes)

        def walk_rows(walk: Walk, least: int, most: int | None) -> None:
            counts = tiling.trial_rows or (range(least, most + 1) if most else None)
            # The sums of slices wait in `out`, which has room for those of one plane.
            slices = -(-depth // walk.depth) if walk.depth and self.planes == 1 else 1
            stride = walk.wide * depth * PANEL  # from a panel to the same one of the next group

            def block(panel: Expr, width: int, row: Expr, height: int, part: Expr) -> None:
                plane_words = self.x.stride // self.planes // 4
                starts = [
                    [
                        tir.bind(((row + m) * self.planes + plane) * plane_words + self.x.offset // 4)
                        for plane in range(self.planes)
                    ]
                    for m in range(height)
                ]
                bases = [tir.bind((panel + p) * (depth * PANEL)) for p in range(width)]

                def partial(m: int, p: int, lane: int, lanes: int) -> Expr:
                    """Sums of the slices before wait where their result will be."""
                    place = (row + m) * self.out.stride + self.out.offset + (panel + p) * PANEL + lane
                    return T.ramp(tir.i64(place), tir.i64(1), lanes)

                def initial(m: int, p: int, lane: int, lanes: int) -> Expr:
                    return T.reinterpret(f"int32x{lanes}", out[partial(m, p, lane, lanes)])

                def done(m: int, p: int, lane: int, lanes: int, sums: list[Expr]) -> None:
                    if isa.dot == "vnni":
                        sums = [total - tir.load(correction, (panel + p) * PANEL + lane, lanes) for total in sums]
                    finish(row + m, panel + p, lane, lanes, sums)

                def keep(m: int, p: int, lane: int, lanes: int, sums: list[Expr]) -> None:
                    (total,) = sums
                    T.buffer_store(out, T.reinterpret(f"float32x{lanes}", total), [partial(m, p, lane, lanes)])

                sums = dot(xq, starts, weight, bases)
                if slices == 1:
                    _steps(sums, walk, stride, 0, depth // 4, depth // 4)
                    sums.store(done)
                    return
                with tir.when(part > tir.i64(0)):
                    sums.resume(initial)
                begin = tir.bind(part * (walk.depth // 4))
                end = tir.bind(T.min(begin + walk.depth // 4, tir.i64(depth // 4)))
                _steps(sums, walk, stride, begin, end, depth // 4)
                tir.either(part == tir.i64(slices - 1), lambda: sums.store(done), lambda: sums.store(keep))

            for_blocks(rows, panels, walk, block, counts, slices)

        def registers(index: int, least: int) -> None:
            most, walk = tiling.walks[index]
            if most is None or (isa.amx and most >= tiling.tiles_from - 1):
                walk_rows(walk, least, tiling.tiles_from - 1 if isa.amx else None)
            else:
                tir.either(rows <= tir.i64(most), lambda: walk_rows(walk, least, most), lambda: registers(index + 1, most + 1))

        if not isa.amx:
            registers(0, 1)
            return

        def tiles() -> None:
            def done(row: Expr, panel: Expr, sums: list[Expr]) -> None:
                finish(row, panel, 0, PANEL, [total - tir.load(correction, panel * PANEL) for total in sums])

            products = TileRows(isa, panels, depth, xq, self.x, self.planes, weight, done)
            products.take(rows, tiling.tile_panels, tiling.tile_wide)

        if tiling.tiles_from == 1:
            tiles()
        else:
            tir.either(rows < tir.i64(tiling.tiles_from), lambda: registers(0, 1), tiles)


def _total(sums: list[Expr], lanes: int) -> Expr:
    """The sums of one plane, or 256 times those of the high plane and those of the low one, as float32 rounded once."""
    single = tir.float_type(lanes)
    if len(sums) == 1:
        return T.cast(sums[0], single)
    high, low = (T.cast(total, tir.with_lanes("float64", lanes)) for total in sums)
    return T.cast(high * tir.splat(T.float64(256.0), lanes) + low, single)


def _steps(sums: SumBlock, walk: Walk, stride: int, begin: Expr, end: Expr, steps: int) -> None:
    """The loop over the inputs begin*4..end*4 of `steps`*4, with the weights of `walk.prefetch` bytes later asked for."""

    span = steps // walk.places

    def loop(start: Expr, stop: Expr, ahead: int) -> None:
        def body(index: Expr) -> None:
            for u in range(walk.unroll):
                first = index if walk.unroll == 1 else tir.bind(index * walk.unroll + u)
                for place in range(walk.places):
                    k = tir.bind(first + place * span) if place else first
                    if walk.prefetch:
                        for base in sums.bases:
                            tir.prefetch(sums.weight, base + k * LINE + ahead, level=int(walk.temporal))
                    sums.step(k)

        first, last = (x // walk.unroll if isinstance(x, int) else T.floordiv(x, tir.i64(walk.unroll)) for x in (start, stop))
        tir.for_range(last, body, first)

    if walk.places > 1:
        end = span  # the inputs come in one slice
    if walk.prefetch and walk.chain and isinstance(end, int):
        turn = max(0, span - walk.prefetch // LINE)  # from here on, what comes next belongs to the next group
        loop(begin, turn, walk.prefetch)
        loop(turn, end, walk.prefetch + stride - span * LINE)
    else:
        loop(begin, end, walk.prefetch)


Place = Callable[[int, int, int, int], Expr]
Finish = Callable[[int, int, int, int, list[Expr]], None]


class SumBlock:
    """Rows x planes x panels of int32 sums in registers of `lanes`; the callbacks get (row, panel, first lane, lanes)."""

    lanes: ClassVar[int]

    def __init__(self, xq: Buffer, starts: list[list[Expr]], weight: Buffer, bases: list[Expr]) -> None:
        """`starts` has the planes of each row."""
        self.xq, self.starts, self.weight, self.bases = xq, list(chain(*starts)), weight, bases
        parts = [(p, lane) for p in range(len(bases)) for lane in range(0, PANEL, self.lanes)]
        planes = len(starts[0])
        self.slots = {  # of the sums of each plane
            (m, p, lane): [(m * planes + plane) * len(parts) + part for plane in range(planes)]
            for m in range(len(starts))
            for part, (p, lane) in enumerate(parts)
        }
        count = len(self.starts) * len(parts)
        self.acc = tir.Registers(count, tir.int_type(self.lanes), tir.splat_i32(0, self.lanes))

    def step(self, k: Expr) -> None:
        """Add the products of inputs 4k..4k+3."""
        raise NotImplementedError

    def resume(self, initial: Place) -> None:
        """Go on from sums of one plane that were stored."""
        for (m, p, lane), (slot,) in self.slots.items():
            self.acc[slot] = initial(m, p, lane, self.lanes)

    def store(self, finish: Finish) -> None:
        """Hand out the sums, one for each plane."""
        for (m, p, lane), slots in self.slots.items():
            finish(m, p, lane, self.lanes, [self.acc[slot] for slot in slots])


class VnniBlock(SumBlock):
    """One vpdpbusd takes 4 inputs of 16 outputs."""

    lanes = PANEL

    def step(self, k: Expr) -> None:
        weights = [tir.bind(tir.load(self.weight, base + k * 64, 64)) for base in self.bases]
        for m, start in enumerate(self.starts):
            tokens = tir.bind(T.reinterpret("int8x64", T.broadcast(self.xq[start + k], 16)))
            for p, panel in enumerate(weights):
                slot = m * len(weights) + p
                self.acc[slot] = tir.pure(tir.I16, "llvm.x86.avx512.vpdpbusd.512", self.acc[slot], tokens, panel)


class MaddubsBlock(SumBlock):
    """The same with 256-bit registers: a panel is two halves of 8 outputs."""

    lanes = PANEL // 2

    def step(self, k: Expr) -> None:
        half = self.lanes
        ones = T.broadcast(T.int16(1), 16)
        signs = T.broadcast(T.int32(-0x7F7F7F80), half)  # 0x80808080
        weights = [tir.bind(tir.load(self.weight, base + k * 64 + h * 32, 32)) for base in self.bases for h in range(2)]
        for m, start in enumerate(self.starts):
            signed = tir.bind(T.reinterpret("int8x32", T.bitwise_xor(T.broadcast(self.xq[start + k], half), signs)))
            absolute = tir.bind(T.max(signed, T.broadcast(T.int8(0), 32) - signed))
            for i, values in enumerate(weights):
                product = tir.pure("int16x16", "llvm.x86.avx2.pmadd.ub.sw", absolute,
                                   tir.pure("int8x32", "llvm.x86.avx2.psign.b", values, signed))  # fmt: skip
                slot = m * len(weights) + i
                self.acc[slot] = self.acc[slot] + tir.pure("int32x8", "llvm.x86.avx2.pmadd.wd", product, ones)
