"""Changes of low rank that adapters make to linear layers: products with a (`Shrink`), then with b (`Expand`).

Both go through the blocks of a step, a few rows whose sequences have the same adapter; a row without an adapter is in no block.
A row is computed from itself and its adapter alone, in an order that depends on the layer's sizes only: the inputs are divided
into chunks, each of which has a program, and `Expand` adds the sums of all chunks.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

import triton
import triton.language as tl

from belle_compile.compiler.backends.program import kernels
from belle_compile.compiler.backends.program.kernel import Pointers, View, round_up
from belle_compile.compiler.backends.triton.kernels.base import Kernel, Start, power_of_two
from belle_compile.compiler.backends.triton.kernels.device import await_earlier, let_next_start
from belle_compile.runtime.program import BLOCK_ROWS, COLUMNS, LANES, RANK_STEP, RegionParts, padded, rank_rows

_RANKS = 16  # that a program computes together
_INPUTS = 256  # that a program of `Shrink` reads at a time
_CHUNKS = 32  # the most of a row of inputs
_OUTPUTS = 2 * COLUMNS  # of a program of `Expand`
_PROGRAMS = 1024  # that keep a large device busy
_BLOCKS = 64  # that are computed at the same time, at most; each program goes through several if there are more
_WARPS = 8
MOST_PARTS = 3  # the linears of one call: q, k and v
_STEP, _LANES, _ROWS, _COLUMNS = (tl.constexpr(number) for number in (RANK_STEP, LANES, BLOCK_ROWS, COLUMNS))


@triton.jit
def _region(rows, sequences_ptr, adapters_ptr, factors_ptr, SLOT: tl.constexpr):
    """What the adapter of a block's rows has for the linear whose region of the first slot is given, and its ranks."""
    sequence = tl.load(sequences_ptr + tl.max(rows, axis=0))  # places without a row have -1
    region = factors_ptr + tl.load(adapters_ptr + sequence).to(tl.int64) * SLOT
    return region, tl.load(region).to(tl.int32) * _STEP


@triton.jit
def _of_part(part, factors0_ptr, factors1_ptr, factors2_ptr):
    """The region in the first slot of the linear with this number."""
    factors_ptr = factors0_ptr
    if factors1_ptr is not None:
        factors_ptr = tl.where(part == 1, factors1_ptr, factors_ptr)
    if factors2_ptr is not None:
        factors_ptr = tl.where(part == 2, factors2_ptr, factors_ptr)
    return factors_ptr


@triton.jit
def _number(part, NUMBERS: tl.constexpr):
    """The number of a linear among those of all linears."""
    number = NUMBERS[0]
    for other in tl.static_range(1, len(NUMBERS)):
        number = tl.where(part == other, NUMBERS[other], number)
    return number


@triton.jit
def shrink(rows_ptr, x_ptr, xq_ptr, xs_ptr, adapted_ptr, sequences_ptr, adapters_ptr, factors0_ptr, factors1_ptr, factors2_ptr,
           sums_ptr, SHAPE: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """Each program multiplies some ranks of one a with one chunk of the rows of a block."""
    RANKS: tl.constexpr = SHAPE.ranks
    INPUTS: tl.constexpr = SHAPE.inputs_at_once
    let_next_start(OVERLAP)
    part = tl.program_id(1) // SHAPE.rank_blocks
    first_rank = tl.program_id(1) % SHAPE.rank_blocks * RANKS
    rank = first_rank + tl.arange(0, RANKS)
    start = tl.program_id(2) * SHAPE.chunk
    inputs = tl.arange(0, INPUTS)
    factors_ptr = _of_part(part, factors0_ptr, factors1_ptr, factors2_ptr)
    for block in range(tl.program_id(0), tl.load(adapted_ptr), tl.num_programs(0)):
        rows = tl.load(adapted_ptr + 1 + block * _ROWS + tl.arange(0, _ROWS))
        region, ranks = _region(rows, sequences_ptr, adapters_ptr, factors_ptr, SHAPE.slot_floats)
        if first_rank < ranks:
            await_earlier(OVERLAP)
            a = (region + SHAPE.a).to(tl.pointer_type(tl.float16 if SHAPE.half else tl.float32)) + start * _STEP
            a = (a + (rank // _STEP * (_STEP * SHAPE.padded_inputs) + rank % _STEP * _LANES)[:, None]
                 + (inputs // _LANES * (_STEP * _LANES) + inputs % _LANES)[None, :])  # fmt: skip
            some = (rows >= 0)[:, None, None]
            places = (rows.to(tl.int64) * SHAPE.x.stride + SHAPE.x.offset + start)[:, None, None] + inputs[None, None, :]
            if SHAPE.planes:
                scale = tl.load(xs_ptr + rows, mask=rows >= 0, other=0.0)[:, None, None]
            sums = tl.zeros((_ROWS, RANKS, INPUTS), tl.float32)
            for done in range(0, SHAPE.chunk, INPUTS):
                inside = start + done + inputs < SHAPE.inputs
                factor = tl.load(a, mask=(rank < ranks)[:, None] & inside[None, :], other=0.0).to(tl.float32)
                there = some & inside[None, None, :]
                if SHAPE.planes:
                    integers = tl.load(xq_ptr + places, mask=there, other=0).to(tl.int32)
                    if SHAPE.planes == 2:
                        integers = integers * 256 + tl.load(xq_ptr + places + SHAPE.x.stride // 2, mask=there, other=0)
                    x = integers.to(tl.float32) * scale
                else:
                    x = tl.load(x_ptr + places, mask=there, other=0.0)
                sums += x * factor[None, :, :]
                a += INPUTS * _STEP
                places += INPUTS
            column = (part * SHAPE.chunks + tl.program_id(2)) * SHAPE.most_ranks + rank
            target = sums_ptr + rows.to(tl.int64)[:, None] * SHAPE.sums.stride + column[None, :]
            tl.store(target, tl.sum(sums, axis=2), mask=(rows >= 0)[:, None] & (rank < ranks)[None, :])
    await_earlier(OVERLAP)


@triton.jit
def expand(rows_ptr, adapted_ptr, sequences_ptr, adapters_ptr, factors0_ptr, factors1_ptr, factors2_ptr, sums_ptr, out_ptr,
           SHAPE: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """Each program adds the changes of some outputs of one linear to the rows of a block."""
    RANKS: tl.constexpr = SHAPE.ranks
    OUTPUTS: tl.constexpr = SHAPE.outputs_at_once
    let_next_start(OVERLAP)
    part = tl.program_id(2)
    columns = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = columns < _number(part, SHAPE.outputs)
    chunk = tl.arange(0, SHAPE.padded_chunks)
    factors_ptr = _of_part(part, factors0_ptr, factors1_ptr, factors2_ptr)
    for block in range(tl.program_id(0), tl.load(adapted_ptr), tl.num_programs(0)):
        rows = tl.load(adapted_ptr + 1 + block * _ROWS + tl.arange(0, _ROWS))
        region, ranks = _region(rows, sequences_ptr, adapters_ptr, factors_ptr, SHAPE.slot_floats)
        if ranks > 0:
            await_earlier(OVERLAP)
            some = (rows >= 0)[:, None]
            b = (region + SHAPE.b).to(tl.pointer_type(tl.float16 if SHAPE.half else tl.float32))
            b = b + (columns // _COLUMNS * (ranks * _COLUMNS) + columns % _COLUMNS)[None, :]
            has = some[:, :, None] & (chunk < SHAPE.chunks)[None, :, None]
            source = sums_ptr + rows.to(tl.int64)[:, None, None] * SHAPE.sums.stride
            source += ((part * SHAPE.chunks + chunk) * SHAPE.most_ranks)[None, :, None]
            change = tl.zeros((_ROWS, RANKS, OUTPUTS), tl.float32)
            for first_rank in range(0, ranks, RANKS):
                rank = first_rank + tl.arange(0, RANKS)
                used = rank < ranks
                of_chunks = tl.load(source + rank[None, None, :], mask=has & used[None, None, :], other=0.0)
                sums = tl.sum(of_chunks, axis=1)
                scale = tl.load(region + SHAPE.scale + rank, mask=used, other=0.0)
                sums = sums * scale[None, :] + tl.load(region + SHAPE.addend + rank, mask=used, other=0.0)[None, :]
                factor = tl.load(b + rank[:, None] * _COLUMNS, mask=used[:, None] & inside[None, :], other=0.0).to(tl.float32)
                change += sums[:, :, None] * factor[None, :, :]
            target = columns + SHAPE.out.offset + _number(part, SHAPE.firsts)
            out = out_ptr + rows.to(tl.int64)[:, None] * SHAPE.out.stride + target[None, :]
            written = some & inside[None, :]
            tl.store(out, tl.load(out, mask=written, other=0.0) + tl.sum(change, axis=1), mask=written)
    await_earlier(OVERLAP)


@dataclass(frozen=True)
class _Changes(Kernel, kernels.LowRank):
    """What both kernels know of the sizes of the layers."""

    ranks: ClassVar[int] = _RANKS

    @property
    def slot_floats(self) -> int:
        """The distance from one slot to the next in float32, the type of pointers to regions."""
        return self.slot // 4

    @property
    def half(self) -> bool:
        """Whether a and b are float16."""
        return self.factors == "float16"

    @property
    def most_ranks(self) -> int:
        """The ranks of the largest change, in whole groups."""
        return rank_rows(self.rank)

    @property
    def chunk(self) -> int:
        """Inputs of a chunk."""
        return round_up(-(-self.inputs // _CHUNKS), _INPUTS)

    @property
    def chunks(self) -> int:
        """Chunks of a row of inputs."""
        return -(-self.inputs // self.chunk)

    @property
    def sums(self) -> View:
        """The products of a row's chunks with the a of each linear: [linears, chunks, ranks]."""
        return View.of_width(len(self.columns.parts) * self.chunks * self.most_ranks)

    @property
    def _region(self) -> RegionParts:
        """The places of a region's parts but for its end, which depends on the outputs."""
        return RegionParts.of(self.rank, self.inputs, 0, self.factors)

    def _start(self, across: int, along: int) -> Start:
        """The grid: programs for each block, and for several blocks if these do not keep a device busy."""
        return Start((min(max(_PROGRAMS // (across * along), 1), _BLOCKS), across, along), 0, _WARPS)


@dataclass(frozen=True)
class Shrink(_Changes):
    """Write the products of a and the rows that have adapters to `sums`."""

    kind: ClassVar[str] = "shrink"
    function = shrink
    inputs_at_once: ClassVar[int] = _INPUTS

    @property
    def rank_blocks(self) -> int:
        """Programs for the ranks of one a."""
        return -(-self.most_ranks // _RANKS)

    @property
    def padded_inputs(self) -> int:
        """Inputs of a row of a."""
        return padded(self.inputs)

    @property
    def a(self) -> int:
        """The float32 of a region before a."""
        return self._region.a // 4

    def pointers(self) -> Pointers:
        *most, _ = super().pointers()
        return (*most, ("sums", "float32"))

    def start(self) -> Start:
        return self._start(self.rank_blocks * len(self.columns.parts), self.chunks)

    def expand(self) -> Expand:
        """The kernel that is called next."""
        return Expand(**{field.name: getattr(self, field.name) for field in fields(self)})


@dataclass(frozen=True)
class Expand(_Changes):
    """Add the products of b and `sums` to the rows."""

    kind: ClassVar[str] = "expand"
    function = expand
    outputs_at_once: ClassVar[int] = _OUTPUTS

    @property
    def padded_chunks(self) -> int:
        """Chunks that a program loads, a power of two."""
        return power_of_two(self.chunks)

    @property
    def firsts(self) -> tuple[int, ...]:
        """The first column of each linear's result."""
        return tuple(first for first, _ in self.columns.parts)

    @property
    def outputs(self) -> tuple[int, ...]:
        """The outputs of each linear."""
        return tuple(outputs for _, outputs in self.columns.parts)

    @property
    def scale(self) -> int:
        """The float32 of a region before the scales."""
        return self._region.scale // 4

    @property
    def addend(self) -> int:
        """The float32 of a region before the addends."""
        return self._region.addend // 4

    @property
    def b(self) -> int:
        """The float32 of a region before b."""
        return self._region.b // 4

    def pointers(self) -> Pointers:
        *most, out = (pointer for pointer in super().pointers() if pointer[0] not in ("x", "xq", "xs"))
        return (*most, ("sums", "float32"), out)

    def start(self) -> Start:
        return self._start(-(-max(self.outputs) // _OUTPUTS), len(self.columns.parts))
