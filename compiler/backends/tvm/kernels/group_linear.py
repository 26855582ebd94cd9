"""int4 linear layer: tokens quantized per row, weights with a scale per output and group of 128 inputs.

Weights lie in panels of 16 outputs as in quantized_linear.py, two a byte: [outputs/16][inputs/8][16][4], the low halves of 64
bytes are one step (16 outputs x 4 inputs) and the high halves the next. They are stored as weight + 8, so one `and` makes
either half a register of unsigned bytes 0..15, and these are the unsigned side of the product; activations, stored as uint8 =
int8 + 128, become the signed side by one `xor`. What is to be taken out again is then 8 * the sum of the row's activations in
the group. It is the same for all outputs, so each group's sums start from it, found for a whole block of panels at once. Signed
weights would cost two more instructions for each register, and with unsigned activations a correction for each output and
group, which is 6% more memory to read.

A group's sum is exact in int32. It is scaled and added to the row's float32 total in one fused step, group after group from the
first input on, so a token's bits depend neither on the rows beside it nor on the instruction set.

On AVX2 a product with weights of 0..15 needs no sign trick, and 8 steps fit in 16 bits: 8 * 2 * 15 * 128 < 2^15.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from compiler.backends.tvm import tir
from compiler.backends.tvm.isa import Isa
from compiler.backends.tvm.kernels.base import Kernel, View, round_up
from compiler.backends.tvm.kernels.panels import PANEL, for_blocks
from compiler.backends.tvm.kernels.quantized_linear import INPUT_ALIGNMENT
from compiler.backends.tvm.kernels.tiling import LINE, LinearTiling, Walk
from compiler.backends.tvm.tir import Buffer, Expr, T
from compiler.ir.meanings import GROUP

CHUNK = 8  # inputs of a panel in one cache line: two steps
WORDS = LINE // 4  # of one, counted in int32 as weights and tokens are


def built_in(isa: Isa) -> LinearTiling:
    """AVX512 has 32 registers, AVX2 has 16 half as wide. Totals wait in memory while a group is summed up. Rows that are fewer
    than a block wait for the memory."""
    wide, tall = (4, 6) if isa.dot == "vnni" else (2, 2)
    return LinearTiling(((tall - 1, Walk(wide, tall, prefetch=1024, chain=True)), (None, Walk(wide, tall))))


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
    tiling: LinearTiling | None = field(default=None, metadata={"named": False})  # None: the built-in one

    def pointers(self) -> tuple[tuple[str, str], ...]:
        bias = (("bias", "float32"),) if self.bias else ()
        return (("rows", "int32"), ("xq", "int32"), ("xs", "float32"), ("weight", "int32"), ("scale", "float16"),
                *bias, ("out", "float32"))  # fmt: skip

    def body(self, isa: Isa, *buffers: Buffer) -> None:
        rows_pointer, xq, xs, weight, scale, *rest = buffers
        bias, out = (rest[0], rest[1]) if self.bias else (None, rest[0])
        rows = tir.rows_of(rows_pointer)
        kind = VnniGroups if isa.dot == "vnni" else MaddubsGroups
        panels = round_up(self.outputs, PANEL) // PANEL
        depth = round_up(self.inputs, INPUT_ALIGNMENT)
        panel_words, groups = depth // CHUNK * WORDS, -(-depth // GROUP)

        def finish(row: Expr, panel: Expr, lane: int, lanes: int, total: Expr) -> None:
            column = panel * PANEL + lane
            of_row = tir.splat(xs[row], lanes)
            value = total * of_row if bias is None else tir.fma(total, of_row, tir.load(bias, column, lanes), lanes)
            tir.store(out, row * self.out.stride + self.out.offset + column, value, lanes)

        def walk_rows(walk: Walk, least: int, most: int | None) -> None:
            def block(panel: Expr, width: int, row: Expr, height: int, part: Expr) -> None:
                starts = [tir.bind(((row + m) * self.x.stride + self.x.offset) // 4) for m in range(height)]
                bases = [tir.bind((panel + p) * panel_words) for p in range(width)]
                scales = [tir.bind((panel + p) * (groups * PANEL)) for p in range(width)]
                sums = kind(xq, starts, weight, bases, scale, scales)
                sums.groups(walk, depth, walk.wide * panel_words)
                for (m, p, lane), slot in sums.slots.items():
                    finish(row + m, panel + p, lane, sums.lanes, sums.totals[slot])

            for_blocks(rows, panels, walk, block, range(least, most + 1) if most else None)

        def choose(index: int, least: int) -> None:
            most, walk = tiling.walks[index]
            if most is None:
                walk_rows(walk, least, None)
            else:
                tir.either(rows <= tir.i64(most), lambda: walk_rows(walk, least, most), lambda: choose(index + 1, most + 1))

        tiling = self.tiling or built_in(isa)
        choose(0, 1)


class GroupSums:
    """Rows x panels of sums in registers of `lanes`: int32 within a group, float32 totals of the groups before."""

    lanes: ClassVar[int]
    together: ClassVar[int]  # chunks whose products are added up at once

    def __init__(self, xq: Buffer, starts: list[Expr], weight: Buffer, bases: list[Expr], scale: Buffer,
                 scale_bases: list[Expr]) -> None:  # fmt: skip
        self.xq, self.starts, self.weight, self.bases = xq, starts, weight, bases
        self.scale, self.scale_bases = scale, scale_bases
        self.parts = [(p, lane) for p in range(len(bases)) for lane in range(0, PANEL, self.lanes)]
        self.slots = {
            (m, p, lane): m * len(self.parts) + i for m in range(len(starts)) for i, (p, lane) in enumerate(self.parts)
        }
        self.acc = tir.Registers(len(self.slots), tir.int_type(self.lanes))
        self.totals = tir.Registers(len(self.slots), tir.float_type(self.lanes), tir.splat(0.0, self.lanes))

    def groups(self, walk: Walk, depth: int, stride: int) -> None:
        """All `depth` inputs. With `walk.prefetch`, weights of so many bytes later are asked for; past a panel's end these are
        those of the next panel or, with `walk.chain`, of the same one in the next block, `stride` words from here.
        """
        count, words = -(-depth // GROUP), depth // CHUNK * WORDS
        ahead = walk.prefetch // 4
        turn = max(0, count - -(-ahead // (GROUP // CHUNK * WORDS))) if walk.chain else count

        def one(group: Expr) -> None:
            # The last group may be half a one. Hidden from LLVM, which would unroll what follows for either length.
            chunks = tir.opaque(T.min(tir.i64(GROUP // CHUNK), depth // CHUNK - group * (GROUP // CHUNK)))
            later = tir.bind(T.Select(group < tir.i64(turn), tir.i64(ahead), tir.i64(ahead + stride - words)))
            self._group(group, chunks, later if ahead else None, walk)

        tir.for_range(count, one)

    def _group(self, group: Expr, chunks: Expr, ahead: Expr | None, walk: Walk) -> None:
        for m, start in enumerate(self.starts):
            initial = tir.bind(T.broadcast(T.int32(0) - self._eightfold(start + group * (GROUP // 4), chunks), self.lanes))
            for i in range(len(self.parts)):
                self.acc[m * len(self.parts) + i] = initial

        def products(index: Expr) -> None:
            chunk = tir.bind(group * (GROUP // CHUNK) + index * self.together)
            if ahead is not None:
                for base in self.bases:
                    for c in range(self.together):
                        tir.prefetch(self.weight, base + (chunk + c) * WORDS + ahead, walk.temporal)
            self._products(chunk)

        tir.for_range(T.floordiv(chunks, tir.i64(self.together)), products)
        for i, (p, lane) in enumerate(self.parts):
            halves = tir.load(self.scale, self.scale_bases[p] + group * PANEL + lane, self.lanes)
            scales = tir.bind(T.cast(halves, tir.float_type(self.lanes)))
            for m in range(len(self.starts)):
                slot = m * len(self.parts) + i
                self.totals[slot] = tir.fma(
                    T.cast(self.acc[slot], tir.float_type(self.lanes)), scales, self.totals[slot], self.lanes
                )

    def _eightfold(self, start: Expr, chunks: Expr) -> Expr:
        """8 * the sum of the activations of some chunks, which lie side by side: a multiple of 64."""
        total = tir.scalar(tir.splat_i32(0, self.lanes), tir.int_type(self.lanes))
        at_once = INPUT_ALIGNMENT // 4

        def part(index: Expr) -> None:
            for offset in range(0, at_once, self.lanes):
                tokens = self._signed(tir.load(self.xq, start + index * at_once + offset, self.lanes))
                total[0] = total[0] + self._fours(T.broadcast(T.int8(8), 4 * self.lanes), tokens)

        tir.for_range(T.floordiv(chunks, tir.i64(INPUT_ALIGNMENT // CHUNK)), part)
        return tir.bind(tir.pure("int32", "llvm.vector.reduce.add", total[0]))

    def _fours(self, unsigned: Expr, signed: Expr) -> Expr:
        """int32 sums of the products of four neighbours each."""
        raise NotImplementedError

    def _products(self, chunk: Expr) -> None:
        """Add the products of `together` chunks."""
        raise NotImplementedError

    def _bytes(self, words: Expr) -> Expr:
        return T.reinterpret(f"int8x{4 * self.lanes}", words)

    def _signed(self, words: Expr) -> Expr:
        """Activations of registers of them: the upper bit turns uint8 = int8 + 128 into int8."""
        return tir.bind(self._bytes(T.bitwise_xor(words, tir.splat_i32(-0x7F7F7F80, self.lanes))))  # 0x80808080

    def _token(self, m: int, step: Expr) -> Expr:
        """The four activations of a step, beside every output."""
        return self._signed(T.broadcast(self.xq[self.starts[m] + step], self.lanes))

    def _weights(self, chunk: Expr, p: int, lane: int) -> tuple[Expr, Expr]:
        """Both steps of a chunk: weights + 8."""
        mask = tir.splat_i32(0x0F0F0F0F, self.lanes)
        both = tir.bind(tir.load(self.weight, self.bases[p] + chunk * WORDS + lane, self.lanes))
        high = T.bitwise_and(T.shift_right(both, tir.splat_i32(4, self.lanes)), mask)
        return tir.bind(self._bytes(T.bitwise_and(both, mask))), tir.bind(self._bytes(high))


class VnniGroups(GroupSums):
    """One vpdpbusd takes 4 inputs of 16 outputs."""

    lanes = PANEL
    together = 1

    def _fours(self, unsigned: Expr, signed: Expr) -> Expr:
        return _dot(tir.splat_i32(0, self.lanes), unsigned, signed)

    def _products(self, chunk: Expr) -> None:
        weights = [self._weights(chunk, p, lane) for p, lane in self.parts]
        for step in range(2):
            for m in range(len(self.starts)):
                token = self._token(m, chunk * 2 + step)
                for i, both in enumerate(weights):
                    slot = m * len(weights) + i
                    self.acc[slot] = _dot(self.acc[slot], both[step], token)


class MaddubsGroups(GroupSums):
    """The same with 256-bit registers: a panel is two halves of 8 outputs, and sums of 8 steps stay in 16 bits."""

    lanes = PANEL // 2
    together = 4

    def _fours(self, unsigned: Expr, signed: Expr) -> Expr:
        return self._added(_pairs(unsigned, signed))

    def _products(self, chunk: Expr) -> None:
        pairs = tir.Registers(len(self.slots), f"int16x{2 * self.lanes}", T.broadcast(T.int16(0), 2 * self.lanes))
        for c in range(self.together):
            tokens = [[self._token(m, (chunk + c) * 2 + step) for step in range(2)] for m in range(len(self.starts))]
            for i, (p, lane) in enumerate(self.parts):
                weights = self._weights(chunk + c, p, lane)
                for m, token in enumerate(tokens):
                    slot = m * len(self.parts) + i
                    for step in range(2):
                        pairs[slot] = pairs[slot] + _pairs(weights[step], token[step])
        for slot in self.slots.values():
            self.acc[slot] = self.acc[slot] + self._added(pairs[slot])

    def _added(self, pairs: Expr) -> Expr:
        """int32 sums of two neighbours each."""
        ones = T.broadcast(T.int16(1), 2 * self.lanes)
        return tir.pure(tir.int_type(self.lanes), "llvm.x86.avx2.pmadd.wd", pairs, ones)


def _dot(total: Expr, unsigned: Expr, signed: Expr) -> Expr:
    return tir.bind(tir.pure(tir.I16, "llvm.x86.avx512.vpdpbusd.512", total, unsigned, signed))


def _pairs(unsigned: Expr, signed: Expr) -> Expr:
    return tir.pure("int16x16", "llvm.x86.avx2.pmadd.ub.sw", unsigned, signed)
