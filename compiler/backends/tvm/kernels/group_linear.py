"""int4 and int6 linear layers: tokens quantized per row, weights with a scale per output and group of 128 inputs.

Weights lie in panels of 16 outputs as in quantized_linear.py, two a byte: [outputs/16][inputs/8][16][4]. The low halves of 64
bytes are one step (16 outputs x 4 inputs), the high halves the next. They are stored as weight + 8: an `and` (high halves are
shifted first) gives bytes 0..15, the unsigned operand of the product; activations, stored as uint8 = int8 + 128, become the
signed operand by an `xor`. The products are then too large by 8 * the sum of the row's activations in the group. That is the
same for all outputs, so activations are converted and summed once per group for a whole block of panels, and sums start
from minus that. Signed weights would cost two more instructions per register; unsigned activations would need a correction per
output and group, 6% more memory to read.

A group's sum is exact in int32. It is scaled and added to the row's float32 total in one fused step, group after group from the
first input on, so a token's bits depend neither on the rows beside it nor on the instruction set.

On AVX2 a product with weights of 0..15 needs no sign trick, and 8 steps fit in 16 bits: 8 * 2 * 15 * 128 < 2^15.

Weights of 6 bits are stored as weight + 32: of each four steps, the low halves are as those of int4, and a third line has the
upper two bits, see packing.pack_int6. On AVX2 two steps fit in 16 bits: 2 * 2 * 63 * 128 < 2^15.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from belle_compile.compiler.backends.program.kernel import Pointers, View, optional, round_up
from belle_compile.compiler.backends.tvm import tir
from belle_compile.compiler.backends.tvm.isa import Isa
from belle_compile.compiler.backends.tvm.kernels.base import Kernel
from belle_compile.compiler.backends.tvm.kernels.panels import PANEL, Block, BlockLoop
from belle_compile.compiler.backends.tvm.kernels.quantized_linear import INPUT_ALIGNMENT
from belle_compile.compiler.backends.tvm.kernels.tiling import LINE, Walk
from belle_compile.compiler.backends.tvm.tir import Buffer, Expr, T
from belle_compile.compiler.ir.constants import GROUP

CHUNK = 8  # inputs of a panel in one cache line: two steps
WORDS = LINE // 4  # int32 words of a cache line; weights and tokens are counted in such words


# AVX512 has 32 registers, AVX2 has 16 of half the width; totals are in memory while a group is summed up. Measured on Zen 4,
# where software prefetch made decoding slower.
WALKS = {"vnni": Walk(4, 6), "maddubs": Walk(1, 4)}


@dataclass(frozen=True)
class GroupLinear(Kernel):
    """out[t, n] = (sum over groups of (sum_k a[t, k] * w[n, k]) * scale[n, group]) * xs[t] + bias[n], as meanings.group_linear
    rounds it."""

    kind: ClassVar[str] = "glinear"
    outputs: int
    inputs: int
    bias: bool
    x: View
    out: View
    bits: int = 4

    def pointers(self) -> Pointers:
        weight = (("weight", "int32"), ("scale", "float16"), *optional(self.bias, "bias"))
        return (("rows", "int32"), ("xq", "int32"), ("xs", "float32"), *weight, ("out", "float32"))

    def body(self, isa: Isa, *buffers: Buffer) -> None:
        named = self.named(buffers)
        panels = round_up(self.outputs, PANEL) // PANEL
        kind = VnniGroups if isa.dot == "vnni" else MaddubsGroups
        BlockLoop(tir.rows_of(named["rows"]), panels, WALKS[isa.dot], lambda block: self._block(block, kind, named)).run()

    def _block(self, block: Block, kind: type[GroupSums], named: dict[str, Buffer]) -> None:
        depth = round_up(self.inputs, INPUT_ALIGNMENT)
        panel_words, groups = depth // CHUNK * WORDS * self.bits // 4, -(-depth // GROUP)
        starts = [tir.bind(((block.row + m) * self.x.stride + self.x.offset) // 4) for m in range(block.height)]
        bases = [tir.bind((block.panel + p) * panel_words) for p in range(block.width)]
        scale_bases = [tir.bind((block.panel + p) * (groups * PANEL)) for p in range(block.width)]
        sums = kind(named["xq"], starts, named["weight"], bases, named["scale"], scale_bases, self.bits)
        sums.add(depth)
        for (m, p, lane), slot in sums.slots.items():
            row, column = block.row + m, (block.panel + p) * PANEL + lane
            value = self._dequantized(sums.totals[slot], row, column, sums.lanes, named)
            tir.store(named["out"], row * self.out.stride + self.out.offset + column, value, sums.lanes)

    def _dequantized(self, total: Expr, row: Expr, column: Expr, lanes: int, named: dict[str, Buffer]) -> Expr:
        step = tir.splat(named["xs"][row], lanes)
        return total * step if not self.bias else tir.fma(total, step, tir.load(named["bias"], column, lanes), lanes)


class GroupSums:
    """Rows x panels of sums in registers of `lanes`: int32 within a group, float32 over the groups before."""

    lanes: ClassVar[int]
    chunks_together: ClassVar[Mapping[int, int]]  # by the bits of weights, the chunks whose products are added up at once

    def __init__(self, xq: Buffer, starts: list[Expr], weight: Buffer, bases: list[Expr], scale: Buffer,
                 scale_bases: list[Expr], bits: int) -> None:  # fmt: skip
        self.xq, self.starts, self.weight, self.bases = xq, starts, weight, bases
        self.bits, self.together = bits, self.chunks_together[bits]
        self.scale, self.scale_bases = scale, scale_bases
        self.parts = [(p, lane) for p in range(len(bases)) for lane in range(0, PANEL, self.lanes)]
        self.slots = {
            (m, p, lane): m * len(self.parts) + i for m in range(len(starts)) for i, (p, lane) in enumerate(self.parts)
        }
        self.acc = tir.Registers(len(self.slots), tir.int_type(self.lanes))
        self.signed = tir.local(len(starts) * GROUP // 4, "int32")
        self.totals = tir.Registers(len(self.slots), tir.float_type(self.lanes), tir.splat(0.0, self.lanes))

    def add(self, depth: int) -> None:
        """Add the products of all `depth` inputs, group by group."""

        def group(index: Expr) -> None:
            # The last group may be a half one. Its length is hidden from LLVM, which would unroll the loop for each length.
            chunks = tir.opaque(T.min(tir.i64(GROUP // CHUNK), depth // CHUNK - index * (GROUP // CHUNK)))
            self._group(index, chunks)

        tir.for_range(-(-depth // GROUP), group)

    def _group(self, group: Expr, chunks: Expr) -> None:
        for m, start in enumerate(self.starts):
            excess = self._take(m, tir.bind(start + group * (GROUP // 4)), chunks)
            initial = tir.bind(T.broadcast(T.int32(0) - excess, self.lanes))
            for i in range(len(self.parts)):
                self.acc[m * len(self.parts) + i] = initial

        def products(index: Expr) -> None:
            chunk = tir.bind(group * (GROUP // CHUNK) + index * self.together)
            self._products(chunk, tir.bind(index * (2 * self.together)))

        tir.for_range(T.floordiv(chunks, tir.i64(self.together)), products)
        for i, (p, lane) in enumerate(self.parts):
            halves = tir.load(self.scale, self.scale_bases[p] + group * PANEL + lane, self.lanes)
            scales = tir.bind(T.cast(halves, tir.float_type(self.lanes)))
            for m in range(len(self.starts)):
                slot = m * len(self.parts) + i
                self.totals[slot] = tir.fma(
                    T.cast(self.acc[slot], tir.float_type(self.lanes)), scales, self.totals[slot], self.lanes
                )

    def _take(self, m: int, start: Expr, chunks: Expr) -> Expr:
        """Store a row's activations of a group as int8 (the upper bit of int8 + 128 is flipped); returns their sum times what
        weights are stored with in excess, 8 or 32."""
        total = tir.scalar(tir.splat_i32(0, self.lanes), tir.int_type(self.lanes))
        at_once = INPUT_ALIGNMENT // 4

        def part(index: Expr) -> None:
            for offset in range(0, at_once, self.lanes):
                place = tir.bind(index * at_once + offset)
                signs = tir.splat_i32(-0x7F7F7F80, self.lanes)  # 0x80808080
                words = tir.bind(T.bitwise_xor(tir.load(self.xq, start + place, self.lanes), signs))
                tir.store(self.signed, place + m * (GROUP // 4), words, self.lanes)
                total[0] = total[0] + self._fours(T.broadcast(T.int8(1 << (self.bits - 1)), 4 * self.lanes), self._bytes(words))

        tir.for_range(T.floordiv(chunks, tir.i64(INPUT_ALIGNMENT // CHUNK)), part)
        return tir.bind(tir.pure("int32", "llvm.vector.reduce.add", total[0]))

    def _fours(self, unsigned: Expr, signed: Expr) -> Expr:
        """The int32 sums of the products of each four neighbours."""
        raise NotImplementedError

    def _products(self, chunk: Expr, step: Expr) -> None:
        """Add the products of `together` chunks from `chunk` of the weights and from `step` of the group's activations."""
        raise NotImplementedError

    def _bytes(self, words: Expr) -> Expr:
        return T.reinterpret(f"int8x{4 * self.lanes}", words)

    def _token(self, m: int, step: Expr) -> Expr:
        """The four activations of a step of the group, repeated for every output."""
        return tir.bind(self._bytes(T.broadcast(self.signed[step + m * (GROUP // 4)], self.lanes)))

    def _weights(self, chunk: Expr, c: int, p: int, lane: int) -> tuple[Expr, Expr]:
        """The weights, with what is in excess, of both steps of the chunk `c` of those added up at once from `chunk` on."""
        mask = tir.splat_i32(0x0F0F0F0F, self.lanes)
        line = chunk + c if self.bits == 4 else T.floordiv(chunk, tir.i64(2)) * 3 + c
        both = tir.bind(tir.load(self.weight, self.bases[p] + line * WORDS + lane, self.lanes))
        steps = [T.bitwise_and(both, mask), T.bitwise_and(T.shift_right(both, tir.splat_i32(4, self.lanes)), mask)]
        if self.bits == 6:
            upper = tir.bind(tir.load(self.weight, self.bases[p] + (line - c + 2) * WORDS + lane, self.lanes))
            steps = [T.bitwise_or(low, self._upper(upper, 2 * c + half)) for half, low in enumerate(steps)]
        return tir.bind(self._bytes(steps[0])), tir.bind(self._bytes(steps[1]))

    def _upper(self, words: Expr, step: int) -> Expr:
        """The upper two bits of the weights of one of four steps, in their place."""
        left = 4 - 2 * step
        amount = tir.splat_i32(abs(left), self.lanes)
        moved = T.shift_left(words, amount) if left > 0 else T.shift_right(words, amount) if left else words
        return T.bitwise_and(moved, tir.splat_i32(0x30303030, self.lanes))


class VnniGroups(GroupSums):
    """Products by vpdpbusd, which multiplies 4 inputs of 16 outputs at once."""

    lanes = PANEL
    chunks_together: ClassVar[Mapping[int, int]] = {4: 1, 6: 2}

    def _fours(self, unsigned: Expr, signed: Expr) -> Expr:
        return _dot(tir.splat_i32(0, self.lanes), unsigned, signed)

    def _products(self, chunk: Expr, step: Expr) -> None:
        for c in range(self.together):
            weights = [self._weights(chunk, c, p, lane) for p, lane in self.parts]
            for half in range(2):
                for m in range(len(self.starts)):
                    token = self._token(m, step + 2 * c + half)
                    for i, both in enumerate(weights):
                        slot = m * len(weights) + i
                        self.acc[slot] = _dot(self.acc[slot], both[half], token)


class MaddubsGroups(GroupSums):
    """Products with 256-bit registers: a panel is two halves of 8 outputs, and sums of 8 steps, of 2 with weights of 6 bits,
    stay in 16 bits."""

    lanes = PANEL // 2
    chunks_together: ClassVar[Mapping[int, int]] = {4: 4, 6: 2}

    def _fours(self, unsigned: Expr, signed: Expr) -> Expr:
        return self._added(_pairs(unsigned, signed))

    def _products(self, chunk: Expr, step: Expr) -> None:
        chunks = list(range(self.together))
        for part in [chunks] if self.bits == 4 else [[c] for c in chunks]:
            pairs = tir.Registers(len(self.slots), f"int16x{2 * self.lanes}", T.broadcast(T.int16(0), 2 * self.lanes))
            for c in part:
                tokens = [[self._token(m, step + 2 * c + half) for half in range(2)] for m in range(len(self.starts))]
                for i, (p, lane) in enumerate(self.parts):
                    weights = self._weights(chunk, c, p, lane)
                    for m, token in enumerate(tokens):
                        slot = m * len(self.parts) + i
                        for half in range(2):
                            pairs[slot] = pairs[slot] + _pairs(weights[half], token[half])
            for slot in self.slots.values():
                self.acc[slot] = self.acc[slot] + self._added(pairs[slot])

    def _added(self, pairs: Expr) -> Expr:
        """The int32 sums of each two neighbours."""
        ones = T.broadcast(T.int16(1), 2 * self.lanes)
        return tir.pure(tir.int_type(self.lanes), "llvm.x86.avx2.pmadd.wd", pairs, ones)


def _dot(total: Expr, unsigned: Expr, signed: Expr) -> Expr:
    return tir.bind(tir.pure(tir.I16, "llvm.x86.avx512.vpdpbusd.512", total, unsigned, signed))


def _pairs(unsigned: Expr, signed: Expr) -> Expr:
    return tir.pure("int16x16", "llvm.x86.avx2.pmadd.ub.sw", unsigned, signed)
