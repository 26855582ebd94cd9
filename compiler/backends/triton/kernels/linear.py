"""Linear layers. In int8 they are tiles on tensor cores, whose contraction is split among programs if there are few rows, and
dot products of 4 bytes for one row or a few, for which every weight is read once. In float32 they are plain tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import triton
import triton.language as tl

from belle_compile.compiler.backends.program import kernels
from belle_compile.compiler.backends.program.kernel import Pointers, Workspace, round_up
from belle_compile.compiler.backends.triton.kernels.base import Kernel, Start, power_of_two
from belle_compile.compiler.backends.triton.kernels.device import await_earlier, begin, let_next_start
from belle_compile.compiler.backends.triton.kernels.rows import DEPTH_ALIGNMENT

_AHEAD = 8192  # bytes of weights that a program prefetches while it waits for earlier kernels
_EARLY = 132 * 160 * 1024  # bytes of weights held by all programs together that a large device starts at the same time
_PIECES = tl.constexpr(4)  # the pieces in which such programs request their weights: enough to keep memory busy
_PROGRAMS = 512  # with this many programs of a kernel, splitting the contraction further gains nothing


@triton.jit
def _total(sums, low_sums, PLANES: tl.constexpr):
    """The sums of the planes as one float32; those of the high plane count 256 times."""
    if PLANES == 2:
        return (sums.to(tl.int64) * 256 + low_sums).to(tl.float32)
    return sums.to(tl.float32)


class Results(NamedTuple):
    """Pointers to the scales of tokens and outputs, the bias or None, and the results."""

    xs: Any
    scale: Any
    bias: Any
    out: Any


@triton.jit
def _finish(sums, low_sums, at, columns, rows, results, SHAPE: tl.constexpr):
    """Dequantize and write a tile."""
    total = _total(sums, low_sums, SHAPE.planes)
    there = columns < SHAPE.outputs
    scale = tl.load(results.scale + columns, mask=there, other=0.0)
    value = total * scale[None, :] * tl.load(results.xs + at, mask=at < rows, other=0.0)[:, None]
    if results.bias is not None:
        value += tl.load(results.bias + columns, mask=there, other=0.0)[None, :]
    out = results.out + at.to(tl.int64)[:, None] * SHAPE.out.stride + SHAPE.out.offset + columns[None, :]
    tl.store(out, value, mask=(at < rows)[:, None] & there[None, :])


@triton.jit
def _ask_for(weight_ptr, columns, start, SHAPE: tl.constexpr, OVERLAP: tl.constexpr):
    """Prefetch the first bytes of each row of weights into the L2 cache, while earlier kernels are still running."""
    if OVERLAP and SHAPE.ahead > 0:
        places = tl.minimum(start + tl.arange(0, SHAPE.ahead // 128) * 128, SHAPE.depth - 64)
        lines = weight_ptr + tl.minimum(columns, SHAPE.outputs - 1).to(tl.int64)[:, None] * SHAPE.depth + places[None, :]
        tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [lines.to(tl.int64)], dtype=tl.int32,
                                  is_pure=False, pack=1)  # fmt: skip


@triton.jit
def _tile_products(xq_ptr, weight_ptr, at, columns, rows, first, last, SHAPE: tl.constexpr):
    """The int32 sums of steps first..last-1 over the inputs for a tile, of the high or only plane and of the low one."""
    BM: tl.constexpr = SHAPE.tile.rows
    BN: tl.constexpr = SHAPE.tile.outputs
    BK: tl.constexpr = SHAPE.tile.inputs
    inputs = tl.arange(0, BK)
    # Rows and outputs beyond the end read the last one, and are not written.
    start = tl.minimum(at, rows - 1).to(tl.int64)[:, None] * SHAPE.x.stride
    x = xq_ptr + start + SHAPE.x.offset + (first * BK + inputs)[None, :]
    source = tl.minimum(columns, SHAPE.outputs - 1).to(tl.int64)
    w = weight_ptr + source[None, :] * SHAPE.depth + (first * BK + inputs)[:, None]
    sums = tl.zeros((BM, BN), tl.int32)
    low_sums = tl.zeros((BM, BN), tl.int32)
    for step in range(first, last):
        if SHAPE.inputs % BK == 0:
            weights = tl.load(w)
            bytes = tl.load(x)
        else:
            there = step * BK + inputs < SHAPE.inputs
            weights = tl.load(w, mask=there[:, None], other=0)
            bytes = tl.load(x, mask=there[None, :], other=0)
        sums = tl.dot(bytes, weights, sums, out_dtype=tl.int32)
        if SHAPE.planes == 2:
            if SHAPE.inputs % BK == 0:
                low = tl.load(x + SHAPE.x.stride // 2)
            else:
                low = tl.load(x + SHAPE.x.stride // 2, mask=there[None, :], other=0)
            low_sums = tl.dot(low, weights, low_sums, out_dtype=tl.int32)
        x += BK
        w += BK
    return sums, low_sums


@triton.jit
def linear_tiles(rows_ptr, xq_ptr, xs_ptr, weight_ptr, scale_ptr, bias_ptr, out_ptr, sums_ptr, tickets_ptr,
                 SHAPE: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """Compute tiles of rows and outputs on tensor cores. If the contraction is split, programs add the products of their inputs
    to `sums`, and the last one finishes the tile and leaves zeros. int32 sums are exact, so their order does not matter."""
    BM: tl.constexpr = SHAPE.tile.rows
    BN: tl.constexpr = SHAPE.tile.outputs
    BK: tl.constexpr = SHAPE.tile.inputs
    SPLITS: tl.constexpr = SHAPE.tile.splits
    let_next_start(OVERLAP)  # called before anything is fetched, because it would wait for the fetches
    rows = tl.load(rows_ptr)  # an input of the step, which is written before the step's first kernel starts
    across: tl.constexpr = (SHAPE.outputs + BN - 1) // BN
    down = (rows + BM - 1) // BM
    tile = tl.program_id(0)
    # Neighbouring programs share a tile of weights, because weights are larger than activations.
    columns = (tile // down) * BN + tl.arange(0, BN)
    steps: tl.constexpr = (SHAPE.inputs + BK - 1) // BK
    if SPLITS == 1:
        first = 0
        last = steps
    else:
        first = tl.program_id(1) * steps // SPLITS
        last = (tl.program_id(1) + 1) * steps // SPLITS
    _ask_for(weight_ptr, columns, first * BK, SHAPE, OVERLAP)
    await_earlier(OVERLAP)
    if tile < down * across:
        at = (tile % down) * BM + tl.arange(0, BM)
        sums, low_sums = _tile_products(xq_ptr, weight_ptr, at, columns, rows, first, last, SHAPE)
        if SPLITS == 1:
            _finish(sums, low_sums, at, columns, rows, Results(xs_ptr, scale_ptr, bias_ptr, out_ptr), SHAPE)
        else:
            place = sums_ptr + tile * (BM * BN * SHAPE.planes) + tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
            tl.atomic_add(place, sums, sem="relaxed")
            if SHAPE.planes == 2:
                tl.atomic_add(place + BM * BN, low_sums, sem="relaxed")
            tl.debug_barrier()  # all threads must have added before one of them takes the ticket
            ticket = tl.atomic_add(tickets_ptr + tile, 1, sem="acq_rel")
            if ticket == SPLITS - 1:
                sums = tl.load(place, cache_modifier=".cg")
                if SHAPE.planes == 2:
                    low_sums = tl.load(place + BM * BN, cache_modifier=".cg")
                tl.debug_barrier()  # a thread may write values that another thread reads
                tl.store(place, tl.zeros((BM, BN), tl.int32))
                if SHAPE.planes == 2:
                    tl.store(place + BM * BN, tl.zeros((BM, BN), tl.int32))
                tl.store(tickets_ptr + tile, 0)
                _finish(sums, low_sums, at, columns, rows, Results(xs_ptr, scale_ptr, bias_ptr, out_ptr), SHAPE)


@triton.jit
def held(w, there, EARLY: tl.constexpr):
    """Load the weights that a program holds in registers.

    The first EARLY programs start while earlier kernels are running; they request a piece only after the previous one has
    arrived, so that the reads and writes of those kernels do not have to queue behind everything that is requested here.
    """
    BN: tl.constexpr = w.shape[0]
    WORDS: tl.constexpr = w.shape[1]
    if tl.program_id(0) < EARLY:
        piece = (tl.arange(0, BN)[:, None] * WORDS + tl.arange(0, WORDS)[None, :]) // (BN * WORDS // _PIECES)
        weights = tl.zeros((BN, WORDS), tl.int32)
        none = 0
        for number in tl.static_range(_PIECES):
            weights = tl.load(w + none, mask=(piece == number) & there, other=weights, eviction_policy="evict_first")
            # This is zero, since that axis has one program; the compiler does not know this, so the next load waits.
            none = tl.multiple_of(tl.max(tl.max(weights, axis=1), axis=0) & tl.program_id(1), 4)
    else:
        weights = tl.load(w, mask=there, other=0, eviction_policy="evict_first")
    return weights


@triton.jit
def _dot4(x, w, sums, NATIVE: tl.constexpr):
    """Add the products of the four signed bytes of x and w to `sums`."""
    if NATIVE:
        sums = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [x, w, sums], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        for byte in tl.static_range(4):
            sums += ((x << (24 - 8 * byte)) >> 24) * ((w << (24 - 8 * byte)) >> 24)
    return sums


@triton.jit
def linear_row(rows_ptr, xq_ptr, xs_ptr, weight_ptr, scale_ptr, bias_ptr, out_ptr, sums_ptr, tickets_ptr,
               SHAPE: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """Compute outputs of one row, or of a few if a program holds all inputs. Every thread reads 16 bytes of weights at once,
    and has many such reads in flight before it needs the first."""
    BN: tl.constexpr = SHAPE.tile.outputs
    WORDS: tl.constexpr = SHAPE.words
    let_next_start(OVERLAP)
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    words = tl.arange(0, WORDS)
    inside = columns < SHAPE.outputs
    source = tl.minimum(columns, SHAPE.outputs - 1).to(tl.int64)
    w = weight_ptr.to(tl.pointer_type(tl.int32)) + (source * (SHAPE.depth // 4))[:, None] + words[None, :]
    STEPS: tl.constexpr = (SHAPE.inputs + 4 * WORDS - 1) // (4 * WORDS)
    if STEPS == 1:  # all weights are requested while earlier kernels are still running
        weights = held(w, (words < (SHAPE.inputs + 3) // 4)[None, :], SHAPE.early if OVERLAP else 0)
    else:
        _ask_for(weight_ptr, columns, 0, SHAPE, OVERLAP)
    scale = tl.load(scale_ptr + columns, mask=inside, other=0.0)
    bias = tl.zeros((BN,), tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns, mask=inside, other=0.0)
    rows = tl.load(rows_ptr)
    await_earlier(OVERLAP)
    ROWS: tl.constexpr = SHAPE.tile.rows
    for row in tl.static_range(ROWS):
        if row < rows:
            x = xq_ptr.to(tl.pointer_type(tl.int32)) + row * (SHAPE.x.stride // 4) + SHAPE.x.offset // 4 + words
            factor = scale * tl.load(xs_ptr + row)
            sums = tl.zeros((BN, WORDS), tl.int32)
            low_sums = tl.zeros((BN, WORDS), tl.int32)
            for step in tl.range(0, STEPS, num_stages=SHAPE.tile.stages):
                # Words are read whole: the inputs of the last word beyond the row have weights of zero.
                there = step * WORDS + words < (SHAPE.inputs + 3) // 4
                if STEPS > 1:
                    weights = tl.load(w, mask=there[None, :], other=0, eviction_policy="evict_first")
                high = tl.load(x, mask=there, other=0)
                sums = _dot4(tl.broadcast_to(high[None, :], (BN, WORDS)), weights, sums, SHAPE.native)
                if SHAPE.planes == 2:
                    low = tl.load(x + SHAPE.x.stride // 8, mask=there, other=0)
                    low_sums = _dot4(tl.broadcast_to(low[None, :], (BN, WORDS)), weights, low_sums, SHAPE.native)
                x += WORDS
                w += WORDS
            total = _total(tl.sum(sums, axis=1), tl.sum(low_sums, axis=1), SHAPE.planes)
            tl.store(out_ptr + row * SHAPE.out.stride + SHAPE.out.offset + columns, total * factor + bias, mask=inside)


@triton.jit
def linear_rows(rows_ptr, xq_ptr, xs_ptr, weight_ptr, scale_ptr, bias_ptr, out_ptr, sums_ptr, tickets_ptr,
                SHAPE: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """Compute outputs of a few rows: weights are read once, as words of four, and multiplied with every row."""
    BM: tl.constexpr = SHAPE.tile.rows
    BN: tl.constexpr = SHAPE.tile.outputs
    WORDS: tl.constexpr = SHAPE.words
    let_next_start(OVERLAP)
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    _ask_for(weight_ptr, columns, 0, SHAPE, OVERLAP)
    await_earlier(OVERLAP)
    rows = tl.load(rows_ptr)
    at = tl.arange(0, BM)
    words = tl.arange(0, WORDS)
    source = tl.minimum(columns, SHAPE.outputs - 1).to(tl.int64)
    w = weight_ptr.to(tl.pointer_type(tl.int32)) + (source * (SHAPE.depth // 4))[None, :, None] + words[None, None, :]
    start = tl.minimum(at, rows - 1) * (SHAPE.x.stride // 4) + SHAPE.x.offset // 4
    x = xq_ptr.to(tl.pointer_type(tl.int32)) + start[:, None, None] + words[None, None, :]
    sums = tl.zeros((BM, BN, WORDS), tl.int32)
    low_sums = tl.zeros((BM, BN, WORDS), tl.int32)
    for step in range(0, (SHAPE.inputs + 4 * WORDS - 1) // (4 * WORDS)):
        # Words are read whole: the inputs of the last word beyond the row have weights of zero.
        there = (step * WORDS + words < (SHAPE.inputs + 3) // 4)[None, None, :]
        weights = tl.broadcast_to(tl.load(w, mask=there, other=0), (BM, BN, WORDS))
        high = tl.broadcast_to(tl.load(x, mask=there, other=0), (BM, BN, WORDS))
        sums = _dot4(high, weights, sums, SHAPE.native)
        if SHAPE.planes == 2:
            low = tl.broadcast_to(tl.load(x + SHAPE.x.stride // 8, mask=there, other=0), (BM, BN, WORDS))
            low_sums = _dot4(low, weights, low_sums, SHAPE.native)
        x += WORDS
        w += WORDS
    results = Results(xs_ptr, scale_ptr, bias_ptr, out_ptr)
    _finish(tl.sum(sums, axis=2), tl.sum(low_sums, axis=2), at, columns, rows, results, SHAPE)


@dataclass(frozen=True)
class Tile:
    """The work of a program: `rows` x `outputs` of the result, `inputs` at a time, with the contraction split among `splits`
    programs; computed by dot products of words of four bytes if `dots`, else by tensor cores."""

    rows: int
    outputs: int
    inputs: int
    splits: int = 1
    warps: int = 4
    stages: int = 3
    dots: bool = False

    def __str__(self) -> str:
        sort = "d" if self.dots else "m"
        return f"{sort}{self.rows}x{self.outputs}x{self.inputs}s{self.splits}w{self.warps}n{self.stages}"


# Tiles by the largest number of rows of a step. The first tile is used until the host has measured them; of the others, an
# engine has those that fit the registers and shared memory of its architecture. Each was the fastest on an H200 for some shape.
# For few rows, each program needs many bytes of weights in flight; for more rows tiles grow, so that more is read only once.
_TILES: tuple[tuple[int | None, tuple[Tile, ...]], ...] = (
    (1, (Tile(1, 4, 4096, warps=4, dots=True), Tile(1, 4, 4096, warps=2, dots=True), Tile(1, 2, 16384, warps=8, dots=True))),
    *((rows, (Tile(16, 32, 512, 4), Tile(rows, 4, 4096, warps=4, dots=True), Tile(rows, 2, 16384, warps=8, dots=True)))
      for rows in (2, 4)),
    (8, (Tile(16, 32, 512, 1, 4, 4), Tile(16, 32, 512, 4), Tile(16, 64, 256, 1, 4, 5), Tile(8, 4, 4096, warps=4, dots=True))),
    (16, (Tile(16, 32, 512, 1), Tile(16, 32, 512, 4, 4, 4), Tile(16, 64, 256, 1, 4, 5), Tile(16, 64, 512, 2))),
    (32, (Tile(32, 32, 256, 4, 4, 4), Tile(32, 32, 512, 1), Tile(32, 64, 512, 1), Tile(32, 128, 256, 4, 8, 4))),
    (64, (Tile(64, 64, 128, 1, 4, 4), Tile(64, 64, 256), Tile(64, 64, 256, 2, 8, 4), Tile(64, 32, 512))),
    (128, (Tile(128, 64, 128), Tile(128, 64, 128, 1, 4, 4), Tile(128, 64, 128, 4, 4, 4), Tile(128, 32, 256, 1, 4, 4))),
    (256, (Tile(128, 128, 128, 1, 8), Tile(128, 64, 128, 1, 4, 4), Tile(128, 64, 128, 1, 4, 5), Tile(256, 64, 128, 2, 8, 4),
           Tile(256, 128, 128, 1, 8))),
    (512, (Tile(128, 128, 128, 1, 8), Tile(128, 64, 128, 1, 4, 4), Tile(128, 128, 128, 1, 4, 4), Tile(256, 128, 128, 1, 8),
           Tile(128, 256, 128, 1, 8, 4))),
    (None, (Tile(128, 128, 128, 1, 8), Tile(128, 128, 64, 1, 4, 4), Tile(256, 128, 128, 1, 8), Tile(128, 256, 128, 1, 8, 4))),
)  # fmt: skip


@dataclass(frozen=True)
class QuantizedLinear(Kernel, kernels.QuantizedLinear):
    """Weights are int8 [outputs, inputs], rows padded with zeros. Dot products are one instruction if `native`; for Triton's
    interpreter, which lacks the instruction, they are written out."""

    activations = "int8"
    tile: Tile = _TILES[-1][1][0]
    others: tuple[Tile, ...] = field(default=(), metadata={"named": False})  # tiles that may be faster on some device
    native: bool = field(default=True, metadata={"named": False})

    @property
    def function(self) -> Any:
        if self.tile.dots:
            return linear_row if self._streams else linear_rows
        return linear_tiles

    @property
    def _streams(self) -> bool:
        """Whether a program has one row, or all inputs at once (`linear_row`)."""
        return self.tile.rows == 1 or self.tile.inputs >= self.inputs

    def pointers(self) -> Pointers:
        return (*super().pointers(), ("sums", "int32"), ("tickets", "int32"))

    def workspaces(self) -> tuple[Workspace, ...]:
        """Sums and tickets of the tiles whose contraction is split, enough for every variant. Only variants for few rows, whose
        tiles have all rows, split the contraction."""
        tiles = [(self._across(tile), tile) for _, tiles in self._choices() for tile in tiles if tile.splits > 1]
        sums = max((across * tile.rows * tile.outputs for across, tile in tiles), default=1)
        return Workspace(4 * sums * self.planes, True), Workspace(4 * max((across for across, _ in tiles), default=1), True)

    def variants(self) -> Sequence[tuple[int | None, QuantizedLinear]]:
        return [(bound, replace(self, tile=tiles[0], others=tiles[1:])) for bound, tiles in self._choices()]

    def alternatives(self) -> tuple[QuantizedLinear, ...]:
        return tuple(replace(self, tile=tile, others=()) for tile in self.others)

    def _choices(self) -> list[tuple[int | None, tuple[Tile, ...]]]:
        """The tiles by number of rows, with at most as many splits as keep a large device busy and as there are steps."""
        return [(bound, tuple(dict.fromkeys(map(self._fitting, tiles)))) for bound, tiles in _TILES]

    def _fitting(self, tile: Tile) -> Tile:
        splits = min(tile.splits, max(1, _PROGRAMS // self._across(tile)), -(-self.inputs // tile.inputs))
        return replace(tile, splits=splits)

    def _across(self, tile: Tile) -> int:
        return -(-self.outputs // tile.outputs)

    def tensor_cores(self) -> bool:
        return not self.tile.dots

    def start(self) -> Start:
        across = self._across(self.tile)
        rows = 0 if self.tile.dots else self.tile.rows
        return Start((across, self.tile.splits, 1), rows, self.tile.warps, self.tile.stages)

    @property
    def depth(self) -> int:
        """The distance in bytes from one row of weights to the next."""
        return round_up(self.inputs, DEPTH_ALIGNMENT)

    @property
    def ahead(self) -> int:
        """Bytes of each row of weights that a program prefetches while it waits for earlier kernels."""
        return _AHEAD // self.tile.outputs // 128 * 128

    @property
    def words(self) -> int:
        """The words of four inputs that a program with dot products reads at a time."""
        return min(self.tile.inputs // 4, power_of_two(-(-self.inputs // 4)))

    @property
    def early(self) -> int:
        """The number of programs that start while earlier kernels are running (`held`)."""
        return _EARLY // (4 * self.tile.outputs * self.words)


_FLOAT_TILE = tl.constexpr(32)  # rows, outputs and inputs of a tile


@triton.jit
def float_tiles(rows_ptr, x_ptr, weight_ptr, bias_ptr, out_ptr, SHAPE: tl.constexpr, OVERLAP: tl.constexpr):
    SIZE: tl.constexpr = _FLOAT_TILE
    rows = begin(rows_ptr, OVERLAP)
    across: tl.constexpr = (SHAPE.outputs + SIZE - 1) // SIZE
    down = (rows + SIZE - 1) // SIZE
    tile = tl.program_id(0)
    if tile < down * across:
        at = (tile % down) * SIZE + tl.arange(0, SIZE)
        columns = (tile // down) * SIZE + tl.arange(0, SIZE)
        inputs = tl.arange(0, SIZE)
        x = x_ptr + tl.minimum(at, rows - 1).to(tl.int64)[:, None] * SHAPE.x.stride + SHAPE.x.offset + inputs[None, :]
        w = weight_ptr + tl.minimum(columns, SHAPE.outputs - 1).to(tl.int64)[None, :] * SHAPE.depth + inputs[:, None]
        sums = tl.zeros((SIZE, SIZE), tl.float32)
        for start in range(0, SHAPE.inputs, SIZE):
            there = start + inputs < SHAPE.inputs
            left = tl.load(x, mask=there[None, :], other=0.0)
            right = tl.load(w, mask=there[:, None], other=0.0)
            sums = tl.dot(left, right, sums, input_precision="ieee")
            x += SIZE
            w += SIZE
        there = columns < SHAPE.outputs
        if bias_ptr is not None:
            sums += tl.load(bias_ptr + columns, mask=there, other=0.0)[None, :]
        out = out_ptr + at.to(tl.int64)[:, None] * SHAPE.out.stride + SHAPE.out.offset + columns[None, :]
        tl.store(out, sums, mask=(at < rows)[:, None] & there[None, :])


@dataclass(frozen=True)
class FloatLinear(Kernel, kernels.FloatLinear):
    """Each program computes a tile of 32 rows and 32 outputs."""

    function = float_tiles

    @property
    def depth(self) -> int:
        """The distance in elements from one row of weights to the next."""
        return round_up(self.inputs, DEPTH_ALIGNMENT // 4)

    def start(self) -> Start:
        size = _FLOAT_TILE.value
        return Start((-(-self.outputs // size), 1, 1), size, 4, 2)
