"""The best logits of each row, selected on the device, so that sampling need not read the whole vocabulary.

The k-th largest of the maxima of chunks is not above the k-th largest logit, since k chunks have a maximum that reaches it. So
every logit among the k largest, and those equal to the last of them, reaches that threshold; few others do. All logits that
reach it are collected, in any order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import triton
import triton.language as tl

from belle_compile.compiler.backends.program.kernel import Pointers, View
from belle_compile.compiler.backends.triton.kernels.base import Kernel, Start, power_of_two
from belle_compile.compiler.backends.triton.kernels.device import begin

CHUNK = 256  # logits that share a maximum
CAPACITY = 4096  # candidates of a row that are stored; beyond that they are only counted
_CHUNK, _CAPACITY = tl.constexpr(CHUNK), tl.constexpr(CAPACITY)
_EACH = tl.constexpr(8)  # chunks of a program
_PARTS = tl.constexpr(8)  # parts of _EACH chunks of a program of `collect`; several, since each has to compute the threshold
_BISECTIONS = tl.constexpr(32)


@triton.jit
def chunk_maxima(rows_ptr, logits_ptr, maxima_ptr, counts_ptr, SHAPE: tl.constexpr, OVERLAP: tl.constexpr):
    rows = begin(rows_ptr, OVERLAP)
    row, program = tl.program_id(0), tl.program_id(1)
    if row < rows:
        chunks = program * _EACH + tl.arange(0, _EACH)
        cols = chunks[:, None] * _CHUNK + tl.arange(0, _CHUNK)[None, :]
        place = logits_ptr + row.to(tl.int64) * SHAPE.logits.stride + cols
        logits = tl.load(place, mask=cols < SHAPE.count, other=float("-inf"))
        # NaN counts as larger than any number, so that it reaches the host.
        maxima = tl.max(tl.where(logits == logits, logits, float("inf")), axis=1)
        tl.store(maxima_ptr + row * SHAPE.chunks + chunks, maxima, mask=chunks < SHAPE.chunks)
        if program == 0:
            tl.store(counts_ptr + row, 0)


@triton.jit
def _ordered(x):
    """An int32 that orders like the float32; both zeros map to the same."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def collect(rows_ptr, wanted_ptr, logits_ptr, maxima_ptr, counts_ptr, places_ptr, values_ptr, SHAPE: tl.constexpr,
            OVERLAP: tl.constexpr):  # fmt: skip
    """Collect the candidates among _PARTS times _EACH chunks of a row."""
    rows = begin(rows_ptr, OVERLAP)
    row = tl.program_id(0)
    if row >= rows:
        return
    wanted = tl.load(wanted_ptr + row)
    if (wanted == 0) | (wanted > SHAPE.chunks):  # all logits are needed
        tl.store(counts_ptr + row, _CAPACITY + 1)
        return
    chunks = tl.arange(0, SHAPE.padded_chunks)
    maxima = tl.load(maxima_ptr + row * SHAPE.chunks + chunks, mask=chunks < SHAPE.chunks, other=float("-inf"))
    order = _ordered(maxima).to(tl.int64)
    # The largest integer that at least `wanted` maxima reach, by bisection over all of int32.
    low = tl.max(order, axis=0)
    if wanted > 1:
        high = low + 1
        low = tl.full((), -2147483648, tl.int64)
        for _ in range(_BISECTIONS):
            middle = (low + high) >> 1
            reached = tl.sum(((order >= middle) & (chunks < SHAPE.chunks)).to(tl.int32), axis=0)
            low = tl.where(reached >= wanted, middle, low)
            high = tl.where(reached >= wanted, high, middle)
    for part in range(tl.program_id(1) * _PARTS, (tl.program_id(1) + 1) * _PARTS):
        own = part * _EACH + tl.arange(0, _EACH)
        best = tl.load(maxima_ptr + row * SHAPE.chunks + own, mask=own < SHAPE.chunks, other=float("-inf"))
        if tl.max(_ordered(best).to(tl.int64), axis=0) >= low:  # true for few parts
            cols = part * _EACH * _CHUNK + tl.arange(0, _EACH * _CHUNK)
            inside = cols < SHAPE.count
            logits = tl.load(logits_ptr + row.to(tl.int64) * SHAPE.logits.stride + cols, mask=inside, other=float("-inf"))
            chosen = ((_ordered(logits).to(tl.int64) >= low) | (logits != logits)) & inside
            number = tl.sum(chosen.to(tl.int32), axis=0)
            first = tl.atomic_add(counts_ptr + row, number, sem="relaxed")
            place = first + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
            fits = chosen & (place < _CAPACITY)
            tl.store(places_ptr + row * _CAPACITY + place, cols, mask=fits)
            tl.store(values_ptr + row * _CAPACITY + place, logits, mask=fits)


@dataclass(frozen=True)
class _Rows(Kernel):
    """A kernel on rows of `count` logits."""

    count: int
    logits: View

    @property
    def chunks(self) -> int:
        """Chunks of a row."""
        return -(-self.count // CHUNK)

    @property
    def padded_chunks(self) -> int:
        """Number of chunks whose largest logits a program holds, a power of two."""
        return power_of_two(self.chunks)


@dataclass(frozen=True)
class ChunkMaxima(_Rows):
    """Write the largest of every `CHUNK` logits to maxima, and 0 to counts."""

    kind: ClassVar[str] = "chunk_maxima"
    function = chunk_maxima

    def pointers(self) -> Pointers:
        return (("rows", "int32"), ("logits", "float32"), ("maxima", "float32"), ("counts", "int32"))

    def start(self) -> Start:
        return Start((1, -(-self.count // (_EACH.value * CHUNK)), 1), 1, 4)


@dataclass(frozen=True)
class Collect(_Rows):
    """Write counts, indices and values of the logits that may be among the `wanted` largest. A count above `CAPACITY` means
    that there are too many candidates, or that all logits are requested."""

    kind: ClassVar[str] = "collect"
    function = collect

    def pointers(self) -> Pointers:
        found = (("counts", "int32"), ("places", "int32"), ("values", "float32"))
        return (("rows", "int32"), ("wanted", "int32"), ("logits", "float32"), ("maxima", "float32"), *found)

    def start(self) -> Start:
        return Start((1, -(-self.count // (_PARTS.value * _EACH.value * CHUNK)), 1), 1, 4)
