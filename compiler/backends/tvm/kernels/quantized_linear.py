"""int8 linear layer: tokens quantized per row, weights per output, dequantized in the epilogue.

Weights are panels of 16 outputs: [outputs/16][inputs/4][16][4] (inputs padded with zeros to 64). This is what vpdpbusd takes
(16 outputs x 4 inputs in one register) and also the B tile of AMX. Activations are stored as uint8 = int8 + 128; subtracting
`correction[n]` = 128 * sum of the weights of output n removes what the 128 adds. AVX2 has no exact unsigned product, so its
kernels return to signed bytes and multiply |w| by a with the sign of w: with |a| <= 127 and |w| <= 128 no sum of a pair
overflows 16 bits.

Activations of 16 bits are two planes of such bytes, a = 256 * high + low: a row has the bytes of `high` in its first half and
those of `low` in its second. Bytes of `low` go down to -128, so that AVX2 multiplies |a| by w with the sign of a; weights must
lie within +-127 there, see passes/quantization/keep_integers.py. Each weight is loaded once and multiplied twice. The two sums,
each exact in int32 for up to `meanings.MAX_INPUTS` inputs, are combined in float64, which is exact too, and rounded to float32
once.
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
from belle_compile.compiler.backends.tvm.kernels.panels import PANEL, Block, BlockLoop
from belle_compile.compiler.backends.tvm.kernels.tiles import TILE
from belle_compile.compiler.backends.tvm.kernels.tiling import LINE, LinearTiling, Walk, built_in
from belle_compile.compiler.backends.tvm.tir import Buffer, Expr, T

INPUT_ALIGNMENT = 64


@dataclass(frozen=True)
class QuantizedLinear(Kernel, kernels.QuantizedLinear):
    """Activations are read four at a time, as int32."""

    activations = "int32"
    corrections = (("correction", "int32"),)
    tiling: LinearTiling | None = field(default=None, metadata={"named": False})  # None stands for `built_in`

    def body(self, isa: Isa, *buffers: Buffer) -> None:
        _Body(self, isa, self.named(buffers)).emit()


class _Body:
    """The statements of a `QuantizedLinear` for one instruction set."""

    def __init__(self, layer: QuantizedLinear, isa: Isa, named: dict[str, Buffer]) -> None:
        self.layer, self.isa, self.named = layer, isa, named
        of_bytes = MaddubsBlock if layer.planes == 1 else PlanesMaddubsBlock
        self.sums_of = VnniBlock if isa.dot == "vnni" else of_bytes
        self.tiling = layer.tiling or built_in(isa, layer.planes)
        self.panels = round_up(layer.outputs, PANEL) // PANEL
        self.depth = round_up(layer.inputs, INPUT_ALIGNMENT)
        self.rows = tir.rows_of(named["rows"])

    def emit(self) -> None:
        """Emit sums in vector registers; with AMX, sums in tiles for many rows."""
        if not self.isa.amx:
            self._by_registers(0, 1)
        elif self.tiling.tiles_from == 1:
            self._by_tiles()
        else:
            few = self.rows < tir.i64(self.tiling.tiles_from)
            tir.either(few, lambda: self._by_registers(0, 1), self._by_tiles)

    def _by_registers(self, index: int, least: int) -> None:
        """Emit the walks of the tiling from number `index`, for `least` rows or more."""
        most, walk = self.tiling.walks[index]
        if most is None or (self.isa.amx and most >= self.tiling.tiles_from - 1):
            self._walk(walk, least, self.tiling.tiles_from - 1 if self.isa.amx else None)
        else:
            tir.either(self.rows <= tir.i64(most), lambda: self._walk(walk, least, most),
                       lambda: self._by_registers(index + 1, most + 1))  # fmt: skip

    def _by_tiles(self) -> None:
        def done(row: Expr, panel: Expr, sums: list[Expr]) -> None:
            self._write(row, panel * PANEL, PANEL, self._corrected(sums, panel * PANEL, PANEL))

        layer, named = self.layer, self.named

        def blocks_of(rows: int) -> None:
            inputs = (self.depth, named["xq"], layer.x, layer.planes)
            products = TileRows(self.isa, self.panels, *inputs, named["weight"], done, rows)
            products.take(self.rows, self.tiling.tile_panels, self.tiling.tile_wide)

        if layer.planes > 1:
            blocks_of(TILE)
        else:
            tir.either(self.rows <= TILE, lambda: blocks_of(TILE), lambda: blocks_of(2 * TILE))

    def _walk(self, walk: Walk, least: int, most: int | None) -> None:
        """Emit all outputs for `least` to `most` rows (None: any number)."""
        counts = self.tiling.trial_rows or (range(least, most + 1) if most else None)
        # Between slices, sums are kept in `out`, which has room for those of one plane.
        slices = -(-self.depth // walk.depth) if walk.depth and self.layer.planes == 1 else 1
        BlockLoop(self.rows, self.panels, walk, lambda block: self._block(block, walk, slices), counts, slices).run()

    def _block(self, block: Block, walk: Walk, slices: int) -> None:
        """Emit the sums of a block over one slice of the inputs; the last slice converts them to results."""
        starts = [self._starts_of(block.row + m) for m in range(block.height)]
        bases = [tir.bind((block.panel + p) * (self.depth * PANEL)) for p in range(block.width)]
        sums = self.sums_of(self.named["xq"], starts, self.named["weight"], bases)
        next_group = walk.wide * self.depth * PANEL  # bytes from a panel to the same one of the next group
        steps = self.depth // 4

        def place(m: int, p: int) -> tuple[Expr, Expr]:
            """The row and the panel's first column."""
            return block.row + m, (block.panel + p) * PANEL

        def finish(m: int, p: int, lane: int, totals: list[Expr]) -> None:
            row, column = place(m, p)
            if self.isa.dot == "vnni":
                totals = self._corrected(totals, column + lane, sums.lanes)
            self._write(row, column + lane, sums.lanes, totals)

        if slices == 1:
            _steps(sums, walk, next_group, 0, steps, steps)
            sums.store(finish)
            return
        # Between slices, the int32 sums are kept in the place of their results.
        out = self.named["out"]

        def resumed(m: int, p: int, lane: int) -> Expr:
            waiting = tir.load(out, self._result_at(*place(m, p)) + lane, sums.lanes)
            return T.reinterpret(tir.int_type(sums.lanes), waiting)

        def keep(m: int, p: int, lane: int, totals: list[Expr]) -> None:
            bits = T.reinterpret(tir.float_type(sums.lanes), totals[0])
            tir.store(out, self._result_at(*place(m, p)) + lane, bits, sums.lanes)

        with tir.when(block.part > tir.i64(0)):
            sums.resume(resumed)
        begin = tir.bind(block.part * (walk.depth // 4))
        end = tir.bind(T.min(begin + walk.depth // 4, tir.i64(steps)))
        _steps(sums, walk, next_group, begin, end, steps)
        tir.either(block.part == tir.i64(slices - 1), lambda: sums.store(finish), lambda: sums.store(keep))

    def _starts_of(self, row: Expr) -> list[Expr]:
        """The indices, counted in int32, at which the planes of a row begin."""
        x, planes = self.layer.x, self.layer.planes
        plane_words = x.stride // planes // 4
        return [tir.bind((row * planes + plane) * plane_words + x.offset // 4) for plane in range(planes)]

    def _result_at(self, row: Expr, column: Expr) -> Expr:
        return row * self.layer.out.stride + self.layer.out.offset + column

    def _corrected(self, sums: list[Expr], column: Expr, lanes: int) -> list[Expr]:
        """The sums without the part that the 128 in activations adds."""
        return [total - tir.load(self.named["correction"], column, lanes) for total in sums]

    def _write(self, row: Expr, column: Expr, lanes: int, sums: list[Expr]) -> None:
        """Write `lanes` outputs of a row; `sums` has one vector for each plane."""
        named = self.named
        value = _total(sums, lanes) * tir.load(named["scale"], column, lanes) * tir.splat(named["xs"][row], lanes)
        if self.layer.bias:
            value = value + tir.load(named["bias"], column, lanes)
        tir.store(named["out"], self._result_at(row, column), value, lanes)


def _total(sums: list[Expr], lanes: int) -> Expr:
    """The sums as float32, rounded once: those of one plane, or 256 times those of the high plane plus those of the low."""
    single = tir.float_type(lanes)
    if len(sums) == 1:
        return T.cast(sums[0], single)
    high, low = (T.cast(total, tir.with_lanes("float64", lanes)) for total in sums)
    return T.cast(high * tir.splat(T.float64(256.0), lanes) + low, single)


def _steps(sums: SumBlock, walk: Walk, next_group: int, begin: Expr, end: Expr, steps: int) -> None:
    """The loop over inputs 4 * begin to 4 * end of 4 * `steps`, with the weights prefetched that are read `walk.prefetch` bytes
    later. `begin` and `end` are static unless the inputs come in slices."""
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
        turn = max(0, span - walk.prefetch // LINE)  # from this step on, prefetches are for the next group
        loop(begin, turn, walk.prefetch)
        loop(turn, end, walk.prefetch + next_group - span * LINE)
    else:
        loop(begin, end, walk.prefetch)


Resume = Callable[[int, int, int], Expr]  # (row of the block, panel of the block, first lane) -> sums of a register's lanes
Finish = Callable[[int, int, int, list[Expr]], None]  # the same three, and the sums of each plane


class SumBlock:
    """Rows x planes x panels of int32 sums in registers of `lanes`."""

    lanes: ClassVar[int]

    def __init__(self, xq: Buffer, starts: list[list[Expr]], weight: Buffer, bases: list[Expr]) -> None:
        """`starts` has the planes of each row."""
        self.xq, self.starts, self.weight, self.bases = xq, list(chain(*starts)), weight, bases
        parts = [(p, lane) for p in range(len(bases)) for lane in range(0, PANEL, self.lanes)]
        planes = len(starts[0])
        self.slots = {  # registers of the sums of each plane
            (m, p, lane): [(m * planes + plane) * len(parts) + part for plane in range(planes)]
            for m in range(len(starts))
            for part, (p, lane) in enumerate(parts)
        }
        count = len(self.starts) * len(parts)
        self.acc = tir.Registers(count, tir.int_type(self.lanes), tir.splat_i32(0, self.lanes))

    def step(self, k: Expr) -> None:
        """Add the products of inputs 4k..4k+3."""
        raise NotImplementedError

    def resume(self, initial: Resume) -> None:
        """Continue from stored sums of one plane."""
        for (m, p, lane), (slot,) in self.slots.items():
            self.acc[slot] = initial(m, p, lane)

    def store(self, finish: Finish) -> None:
        """Call `finish` with all sums."""
        for (m, p, lane), slots in self.slots.items():
            finish(m, p, lane, [self.acc[slot] for slot in slots])


class VnniBlock(SumBlock):
    """Products by vpdpbusd, which multiplies 4 inputs of 16 outputs at once."""

    lanes = PANEL

    def step(self, k: Expr) -> None:
        weights = [tir.bind(tir.load(self.weight, base + k * 64, 64)) for base in self.bases]
        for m, start in enumerate(self.starts):
            tokens = tir.bind(T.reinterpret("int8x64", T.broadcast(self.xq[start + k], 16)))
            for p, panel in enumerate(weights):
                slot = m * len(weights) + p
                self.acc[slot] = tir.pure(tir.I16, "llvm.x86.avx512.vpdpbusd.512", self.acc[slot], tokens, panel)


class MaddubsBlock(SumBlock):
    """Products with 256-bit registers: a panel is two halves of 8 outputs. Magnitudes of weights are the unsigned operand."""

    lanes = PANEL // 2

    def step(self, k: Expr) -> None:
        tokens = [self._token(start, k) for start in self.starts]
        for i, place in enumerate(self._weight_places(k)):  # one weight and its magnitude at a time in registers
            values = tir.bind(tir.load(self.weight, place, 32))
            magnitudes = _absolute(values)
            for m, token in enumerate(tokens):
                self._add(m, i, _maddubs(magnitudes, _with_signs(token, values)))

    def _token(self, start: Expr, k: Expr) -> Expr:
        """Four signed bytes of the activations from `start` on, in every lane."""
        signs = T.broadcast(T.int32(-0x7F7F7F80), self.lanes)  # 0x80808080
        return tir.bind(T.reinterpret("int8x32", T.bitwise_xor(T.broadcast(self.xq[start + k], self.lanes), signs)))

    def _weight_places(self, k: Expr) -> list[Expr]:
        return [base + k * 64 + half * 32 for base in self.bases for half in range(2)]

    def _add(self, m: int, i: int, pairs: Expr) -> None:
        """Add sums of two neighbouring products of row m and half panel i, in 16 bits."""
        ones = T.broadcast(T.int16(1), 16)
        slot = m * 2 * len(self.bases) + i
        self.acc[slot] = self.acc[slot] + tir.pure("int32x8", "llvm.x86.avx2.pmadd.wd", pairs, ones)


class PlanesMaddubsBlock(MaddubsBlock):
    """The same for activations of 16 bits, whose bytes are down to -128: magnitudes of activations are the unsigned operand."""

    def step(self, k: Expr) -> None:
        weights = [tir.bind(tir.load(self.weight, place, 32)) for place in self._weight_places(k)]
        for m, start in enumerate(self.starts):
            token = self._token(start, k)
            magnitudes = _absolute(token)
            for i, values in enumerate(weights):
                self._add(m, i, _maddubs(magnitudes, _with_signs(values, token)))


def _maddubs(unsigned: Expr, signed: Expr) -> Expr:
    return tir.pure("int16x16", "llvm.x86.avx2.pmadd.ub.sw", unsigned, signed)


def _absolute(values: Expr) -> Expr:
    """Magnitudes as unsigned bytes: that of -128 is 128."""
    return tir.bind(T.max(values, T.broadcast(T.int8(0), 32) - values))


def _with_signs(values: Expr, signs: Expr) -> Expr:
    """Values times the signs of other ones; values must not be -128."""
    return tir.pure("int8x32", "llvm.x86.avx2.psign.b", values, signs)
