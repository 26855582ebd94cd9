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
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar

from compiler.backends.tvm import tir
from compiler.backends.tvm.isa import Isa
from compiler.backends.tvm.kernels.amx import tile_rows
from compiler.backends.tvm.kernels.base import Kernel, View, round_up
from compiler.backends.tvm.kernels.panels import PANEL, for_blocks
from compiler.backends.tvm.tir import Buffer, Expr, T

INPUT_ALIGNMENT = 64
AMX_FROM_ROWS = 16
PREFETCH_BYTES = 2048  # ahead of the weights being read, per panel


@dataclass(frozen=True)
class QuantizedLinear(Kernel):
    """out[t, n] = (sum_k a[t, k] * w[n, k]) * ws[n] * xs[t] + bias[n]; the sum is exact."""

    kind: ClassVar[str] = "qlinear"
    outputs: int
    inputs: int
    bias: bool
    x: View
    out: View
    planes: int = 1

    def pointers(self) -> tuple[tuple[str, str], ...]:
        bias = (("bias", "float32"),) if self.bias else ()
        return (("rows", "int32"), ("xq", "int32"), ("xs", "float32"), ("weight", "int8"), ("scale", "float32"),
                ("correction", "int32"), *bias, ("out", "float32"))  # fmt: skip

    def body(self, isa: Isa, *buffers: Buffer) -> None:
        rows_pointer, xq, xs, weight, scale, correction, *rest = buffers
        bias, out = (rest[0], rest[1]) if self.bias else (None, rest[0])
        rows = tir.rows_of(rows_pointer)
        dot = _vnni_block if isa.dot == "vnni" else _maddubs_block
        # Panels and rows of a block: as many as accumulators, weights and a token fit in 32 registers; 16 with AVX2,
        # where a panel takes two.
        wide, tall = (4, 6 // self.planes) if isa.dot == "vnni" else (2, 2 // self.planes)
        panels = round_up(self.outputs, PANEL) // PANEL
        depth = round_up(self.inputs, INPUT_ALIGNMENT)

        def finish(row: Expr, panel: Expr, lane: int, lanes: int, sums: list[Expr]) -> None:
            """Write `lanes` outputs of a panel from `lane` on; `sums` has one for each plane."""
            column = panel * PANEL + lane
            value = _total(sums, lanes) * tir.load(scale, column, lanes) * tir.splat(xs[row], lanes)
            if bias is not None:
                value = value + tir.load(bias, column, lanes)
            tir.store(out, row * self.out.stride + self.out.offset + column, value, lanes)

        def block(panel: Expr, width: int, row: Expr, height: int) -> None:
            plane_words = self.x.stride // self.planes // 4
            starts = [
                [tir.bind(((row + m) * self.planes + plane) * plane_words + self.x.offset // 4) for plane in range(self.planes)]
                for m in range(height)
            ]
            bases = [tir.bind((panel + p) * (depth * PANEL)) for p in range(width)]
            streaming = height < tall or tall == 1  # these may be the only rows, so the weights come from memory
            dot(xq, starts, weight, bases, depth // 4, streaming, correction, panel,
                lambda m, p, lane, lanes, sums: finish(row + m, panel + p, lane, lanes, sums))  # fmt: skip

        if not isa.amx:
            for_blocks(rows, panels, wide, tall, block)
            return

        def tiles() -> None:
            tile_rows(isa, rows, panels, depth, xq, self.x, self.planes, weight, out, self.out, lambda r, p, sums: finish(
                r, p, 0, PANEL, [total - tir.load(correction, p * PANEL) for total in sums]))  # fmt: skip

        tir.either(rows < tir.i64(AMX_FROM_ROWS), lambda: for_blocks(rows, panels, wide, tall, block), tiles)


Finish = Callable[[int, int, int, int, list[Expr]], None]


def _total(sums: list[Expr], lanes: int) -> Expr:
    """The sums of one plane, or 256 times those of the high plane and those of the low one, as float32 rounded once."""
    single = tir.float_type(lanes)
    if len(sums) == 1:
        return T.cast(sums[0], single)
    high, low = (T.cast(total, tir.with_lanes("float64", lanes)) for total in sums)
    return T.cast(high * tir.splat(T.float64(256.0), lanes) + low, single)


def _vnni_block(xq: Buffer, starts: list[list[Expr]], weight: Buffer, bases: list[Expr], steps: int, streaming: bool,
                correction: Buffer, panel: Expr, finish: Finish) -> None:  # fmt: skip
    """Rows x planes x panels in registers; one vpdpbusd takes 4 inputs of 16 outputs."""
    width, planes = len(bases), len(starts[0])
    acc = tir.Registers(len(starts) * planes * width, tir.I16, tir.splat_i32(0))

    def step(k: Expr) -> None:
        if streaming:
            for base in bases:
                tir.prefetch(weight, base + k * 64 + PREFETCH_BYTES)
        weights = [tir.bind(tir.load(weight, base + k * 64, 64)) for base in bases]
        for m, start in enumerate(chain(*starts)):
            tokens = tir.bind(T.reinterpret("int8x64", T.broadcast(xq[start + k], 16)))
            for p in range(width):
                acc[m * width + p] = tir.pure(tir.I16, "llvm.x86.avx512.vpdpbusd.512", acc[m * width + p], tokens, weights[p])

    tir.for_range(steps, step)
    for m in range(len(starts)):
        for p in range(width):
            sums = [acc[(m * planes + plane) * width + p] for plane in range(planes)]
            finish(m, p, 0, PANEL, [total - tir.load(correction, (panel + p) * PANEL) for total in sums])


def _maddubs_block(xq: Buffer, starts: list[list[Expr]], weight: Buffer, bases: list[Expr], steps: int, streaming: bool,
                   correction: Buffer, panel: Expr, finish: Finish) -> None:  # fmt: skip
    """The same with 256-bit registers: a panel is two halves of 8 outputs."""
    half, width, planes = 8, len(bases), len(starts[0])
    acc = tir.Registers(len(starts) * planes * width * 2, "int32x8", tir.splat_i32(0, half))
    ones = T.broadcast(T.int16(1), 16)
    signs = T.broadcast(T.int32(-0x7F7F7F80), half)  # 0x80808080

    def step(k: Expr) -> None:
        if streaming:
            for base in bases:
                tir.prefetch(weight, base + k * 64 + PREFETCH_BYTES)
        weights = [tir.bind(tir.load(weight, base + k * 64 + h * 32, 32)) for base in bases for h in range(2)]
        for m, start in enumerate(chain(*starts)):
            signed = tir.bind(T.reinterpret("int8x32", T.bitwise_xor(T.broadcast(xq[start + k], half), signs)))
            absolute = tir.bind(T.max(signed, T.broadcast(T.int8(0), 32) - signed))
            for i, values in enumerate(weights):
                product = tir.pure("int16x16", "llvm.x86.avx2.pmadd.ub.sw", absolute,
                                   tir.pure("int8x32", "llvm.x86.avx2.psign.b", values, signed))  # fmt: skip
                slot = m * width * 2 + i
                acc[slot] = acc[slot] + tir.pure("int32x8", "llvm.x86.avx2.pmadd.wd", product, ones)

    tir.for_range(steps, step)
    for m in range(len(starts)):
        for p in range(width):
            for h in range(2):
                finish(m, p, h * half, half, [acc[((m * planes + plane) * width + p) * 2 + h] for plane in range(planes)])
