"""int8 linear layer: tokens quantized per row, weights per output, dequantized in the epilogue.

Weights are panels of 16 outputs: [outputs/16][inputs/4][16][4] (inputs padded with zeros to 64), which is what vpdpbusd
wants (16 outputs x 4 inputs in one register) and also the B tile of AMX. Activations are stored as uint8 = int8 + 128;
`correction[n]` = 128 * sum of the weights of output n takes the 128 out again. AVX2 has no exact unsigned product, so it
goes back to signed bytes and multiplies |a| by w with the sign of a: within +-127 no pair sum overflows 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
    """out[t, n] = (sum_k a[t, k] * w[n, k]) * ws[n] * xs[t] + bias[n]; the sum is exact in int32."""

    kind: ClassVar[str] = "qlinear"
    outputs: int
    inputs: int
    bias: bool
    x: View
    out: View

    def pointers(self) -> tuple[tuple[str, str], ...]:
        bias = (("bias", "float32"),) if self.bias else ()
        return (("rows", "int32"), ("xq", "int32"), ("xs", "float32"), ("weight", "int8"), ("scale", "float32"),
                ("correction", "int32"), *bias, ("out", "float32"))  # fmt: skip

    def body(self, isa: Isa, *buffers: Buffer) -> None:
        rows_pointer, xq, xs, weight, scale, correction, *rest = buffers
        bias, out = (rest[0], rest[1]) if self.bias else (None, rest[0])
        rows = tir.rows_of(rows_pointer)
        dot = _vnni_block if isa.dot == "vnni" else _maddubs_block
        wide, tall = (4, 6) if isa.dot == "vnni" else (2, 2)
        panels = round_up(self.outputs, PANEL) // PANEL
        depth = round_up(self.inputs, INPUT_ALIGNMENT)

        def finish(row: Expr, panel: Expr, lane: int, lanes: int, total: Expr) -> None:
            """Write `lanes` outputs of a panel from `lane` on."""
            column = panel * PANEL + lane
            value = T.cast(total, f"float32x{lanes}") * tir.load(scale, column, lanes) * tir.splat(xs[row], lanes)
            if bias is not None:
                value = value + tir.load(bias, column, lanes)
            tir.store(out, row * self.out.stride + self.out.offset + column, value, lanes)

        def block(panel: Expr, width: int, row: Expr, height: int) -> None:
            starts = [tir.bind((row + m) * (self.x.stride // 4) + self.x.offset // 4) for m in range(height)]
            bases = [tir.bind((panel + p) * (depth * PANEL)) for p in range(width)]
            dot(xq, starts, weight, bases, depth // 4, height < tall, correction, panel,
                lambda m, p, lane, lanes, total: finish(row + m, panel + p, lane, lanes, total))  # fmt: skip

        if not isa.amx:
            for_blocks(rows, panels, wide, tall, block)
            return

        def tiles() -> None:
            tile_rows(isa, rows, panels, depth, xq, self.x, weight, out, self.out, lambda r, p, total: finish(
                r, p, 0, PANEL, total - tir.load(correction, p * PANEL)))  # fmt: skip

        tir.either(rows < tir.i64(AMX_FROM_ROWS), lambda: for_blocks(rows, panels, wide, tall, block), tiles)


Finish = Callable[[int, int, int, int, Expr], None]


def _vnni_block(xq: Buffer, starts: list[Expr], weight: Buffer, bases: list[Expr], steps: int, streaming: bool,
                correction: Buffer, panel: Expr, finish: Finish) -> None:  # fmt: skip
    """Rows x panels in registers; one vpdpbusd takes 4 inputs of 16 outputs."""
    width = len(bases)
    acc = tir.Registers(len(starts) * width, tir.I16, tir.splat_i32(0))

    def step(k: Expr) -> None:
        if streaming:
            for base in bases:
                tir.prefetch(weight, base + k * 64 + PREFETCH_BYTES)
        weights = [tir.bind(tir.load(weight, base + k * 64, 64)) for base in bases]
        for m, start in enumerate(starts):
            tokens = tir.bind(T.reinterpret("int8x64", T.broadcast(xq[start + k], 16)))
            for p in range(width):
                acc[m * width + p] = tir.pure(tir.I16, "llvm.x86.avx512.vpdpbusd.512", acc[m * width + p], tokens, weights[p])

    tir.for_range(steps, step)
    for m in range(len(starts)):
        for p in range(width):
            finish(m, p, 0, PANEL, acc[m * width + p] - tir.load(correction, (panel + p) * PANEL))


def _maddubs_block(xq: Buffer, starts: list[Expr], weight: Buffer, bases: list[Expr], steps: int, streaming: bool,
                   correction: Buffer, panel: Expr, finish: Finish) -> None:  # fmt: skip
    """The same with 256-bit registers: a panel is two halves of 8 outputs."""
    half, width = 8, len(bases)
    acc = tir.Registers(len(starts) * width * 2, "int32x8", tir.splat_i32(0, half))
    ones = T.broadcast(T.int16(1), 16)
    signs = T.broadcast(T.int32(-0x7F7F7F80), half)  # 0x80808080

    def step(k: Expr) -> None:
        if streaming:
            for base in bases:
                tir.prefetch(weight, base + k * 64 + PREFETCH_BYTES)
        weights = [tir.bind(tir.load(weight, base + k * 64 + h * 32, 32)) for base in bases for h in range(2)]
        for m, start in enumerate(starts):
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
                finish(m, p, h * half, half, acc[(m * width + p) * 2 + h])
