"""The nonlinearities of the feed-forward layers, Hadamard transforms, and the quantization of the results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import triton
import triton.language as tl

from belle_compile.compiler.backends.program import kernels
from belle_compile.compiler.backends.program.kernel import Pointers
from belle_compile.compiler.backends.triton.kernels.base import Kernel, Start, power_of_two, warps_for
from belle_compile.compiler.backends.triton.kernels.device import (
    begin,
    block_hadamard,
    gelu,
    largest,
    quantize_by,
    quantize_row,
    scaled_sigmoid,
)

_CHUNK = 512  # channels of a program if several programs share a row
_FEW = 64  # for up to this many rows programs share a row; with one program each, most multiprocessors would be idle


@triton.jit
def _activated(x, at, up_ptr, cols, inside, SIZE: tl.constexpr, SHAPE: tl.constexpr):
    """The nonlinearity and the transform of SIZE channels of a row."""
    if SHAPE.nonlinearity == "gelu":
        x = gelu(x)
    elif SHAPE.nonlinearity == "swiglu":
        x = scaled_sigmoid(x, x) * tl.load(up_ptr + (at * SHAPE.up.stride + SHAPE.up.offset) + cols, mask=inside, other=0.0)
    if SHAPE.transformed:
        x = block_hadamard(x, cols, SIZE, SHAPE.transformed)
    return x


@triton.jit
def activate_rows(rows_ptr, x_ptr, up_ptr, step_ptr, maxima_ptr, xq_ptr, xs_ptr, out_ptr, SHAPE: tl.constexpr,
                  OVERLAP: tl.constexpr):  # fmt: skip
    rows = begin(rows_ptr, OVERLAP)
    row = tl.program_id(0)
    if row < rows:
        cols = tl.arange(0, SHAPE.padded)
        inside = cols < SHAPE.width
        at = row.to(tl.int64)
        x = tl.load(x_ptr + at * SHAPE.x.stride + SHAPE.x.offset + cols, mask=inside, other=0.0)
        x = _activated(x, at, up_ptr, cols, inside, SHAPE.padded, SHAPE)
        if out_ptr is not None:
            tl.store(out_ptr + at * SHAPE.out.stride + SHAPE.out.offset + cols, x, mask=inside)
        else:
            quantize_row(x, row, cols, xq_ptr, xs_ptr, step_ptr, SHAPE)


@triton.jit
def activate_chunks(rows_ptr, x_ptr, up_ptr, maxima_ptr, xq_ptr, xs_ptr, SHAPE: tl.constexpr, OVERLAP: tl.constexpr):
    """Compute a chunk of a row in place, and its largest absolute value."""
    rows = begin(rows_ptr, OVERLAP)
    row, chunk = tl.program_id(0), tl.program_id(1)
    if row < rows:
        cols = chunk * SHAPE.chunk + tl.arange(0, SHAPE.chunk)
        inside = cols < SHAPE.whole.width
        at = row.to(tl.int64)
        place = x_ptr + at * SHAPE.whole.x.stride + SHAPE.whole.x.offset + cols
        x = tl.load(place, mask=inside, other=0.0)
        x = _activated(x, at, up_ptr, cols, inside, SHAPE.chunk, SHAPE.whole)
        tl.store(place, x, mask=inside)
        tl.store(maxima_ptr + row * SHAPE.chunks + chunk, largest(x))


@triton.jit
def quantize_chunks(rows_ptr, x_ptr, maxima_ptr, xq_ptr, xs_ptr, SHAPE: tl.constexpr, OVERLAP: tl.constexpr):
    """Quantize a part of a row whose chunks have been activated; do nothing if the first step has quantized the whole row."""
    rows = begin(rows_ptr, OVERLAP)
    row = tl.program_id(0)
    if not SHAPE.done:
        whole: tl.constexpr = SHAPE.first.whole
        if row < rows:
            chunks = tl.arange(0, SHAPE.padded_chunks)
            found = tl.load(maxima_ptr + row * SHAPE.first.chunks + chunks, mask=chunks < SHAPE.first.chunks, other=0.0)
            absmax = largest(found)
            cols = tl.program_id(1) * SHAPE.columns + tl.arange(0, SHAPE.columns)
            place = x_ptr + row.to(tl.int64) * whole.x.stride + whole.x.offset + cols
            x = tl.load(place, mask=cols < whole.width, other=0.0)
            quantize_by(x, absmax, row, cols, xq_ptr, xs_ptr, whole)


class _WholeRow(Kernel):
    """A kernel of `activate_rows`, in which each program computes one row."""

    width: int
    function = activate_rows

    @property
    def nonlinearity(self) -> str:
        """The nonlinearity that is computed first: "gelu", "swiglu" or "none"."""
        return "none"

    @property
    def transformed(self) -> int:
        """Channels of the Hadamard blocks that are transformed next; 0 for no transform."""
        return 0

    @property
    def padded(self) -> int:
        """Channels that a program holds, a power of two."""
        return max(power_of_two(self.width), self.transformed)

    def start(self) -> Start:
        return Start((1, 1, 1), 1, warps_for(self.width))


@dataclass(frozen=True)
class Activation(_WholeRow, kernels.Activation):
    """Few wide rows with a scale each are split among several programs (`ActivateChunks`)."""

    @property
    def nonlinearity(self) -> str:
        return self.activation

    @property
    def transformed(self) -> int:
        return self.hadamard or 0

    @property
    def chunked(self) -> bool:
        """Whether `ActivateChunks` and `QuantizeChunks` compute this kernel in two steps, which is faster for few rows."""
        return self.quantize and not self.step and self.width > 2 * _CHUNK


@dataclass(frozen=True)
class BlockHadamard(_WholeRow, kernels.BlockHadamard):
    @property
    def transformed(self) -> int:
        return self.block


@dataclass(frozen=True)
class QuantizeTokens(_WholeRow, kernels.QuantizeTokens):
    pass


@dataclass(frozen=True)
class ActivateChunks(Kernel):
    """The first of two steps that compute an `Activation` with one scale per row.

    For few rows it writes the result to the buffer of x and the largest absolute value of each chunk to `maxima`. For many rows
    (`chunked` is false) it computes everything, and the second step, `QuantizeChunks`, does nothing.
    """

    kind: ClassVar[str] = "activation"
    whole: Activation
    chunked: bool = True

    @property
    def name(self) -> str:
        return self.whole.name + ("_c" if self.chunked else "_w")

    @property
    def function(self) -> Any:
        return activate_chunks if self.chunked else activate_rows

    @property
    def chunk(self) -> int:
        """Channels that a program computes."""
        return max(_CHUNK, self.whole.hadamard or 0)

    @property
    def chunks(self) -> int:
        """Number of chunks of a row."""
        return -(-self.whole.width // self.chunk)

    def variants(self) -> Sequence[tuple[int | None, ActivateChunks]]:
        return [(_FEW, self), (None, replace(self, chunked=False))]

    def pointers(self) -> Pointers:
        *most, xq, xs = self.whole.pointers()
        return (*most, ("maxima", "float32"), xq, xs)

    def start(self) -> Start:
        return Start((1, self.chunks, 1), 1, warps_for(self.chunk, 4)) if self.chunked else self.whole.start()

    def shape(self) -> Any:
        return self if self.chunked else self.whole


@dataclass(frozen=True)
class QuantizeChunks(Kernel):
    """The second step: it quantizes a few rows, with the scale that follows from the largest absolute value of all chunks."""

    kind: ClassVar[str] = "quantize"
    first: ActivateChunks
    done: bool = False

    function = quantize_chunks

    @property
    def columns(self) -> int:
        """Channels that a program quantizes."""
        return _CHUNK

    @property
    def padded_chunks(self) -> int:
        """Number of chunks whose largest values a program holds, a power of two."""
        return power_of_two(self.first.chunks)

    @property
    def name(self) -> str:
        return f"quantize_{self.first.name}" + ("_d" if self.done else "")

    def variants(self) -> Sequence[tuple[int | None, QuantizeChunks]]:
        return [(_FEW, self), (None, replace(self, done=True))]

    def pointers(self) -> Pointers:
        return (("rows", "int32"), ("x", "float32"), ("maxima", "float32"), ("xq", "int8"), ("xs", "float32"))

    def start(self) -> Start:
        if self.done:
            return Start((1, 1, 1), 0, 1)
        return Start((1, -(-self.first.whole.width // _CHUNK), 1), 1, warps_for(_CHUNK, 4))
