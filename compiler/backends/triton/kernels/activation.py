"""The nonlinearities of the feed-forward layers, Hadamard transforms, and the quantization of what they give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import triton
import triton.language as tl

from belle_compile.compiler.backends.program import kernels
from belle_compile.compiler.backends.program.kernel import Pointers, View
from belle_compile.compiler.backends.triton.kernels.base import Kernel, Start, of_view, power_of_two, warps_for
from belle_compile.compiler.backends.triton.kernels.device import (
    begin,
    block_hadamard,
    gelu,
    largest,
    quantize_by,
    quantize_row,
    scaled_sigmoid,
)

_CHUNK = 512  # channels of a program where a row has several
_FEW = 64  # rows up to which there are several, or one multiprocessor would work for a token while the others wait


@triton.jit
def _activated(x, up_ptr, up_place, cols, inside, SIZE: tl.constexpr, FUNCTION: tl.constexpr, HADAMARD: tl.constexpr,
               LEVELS: tl.constexpr, SCALE: tl.constexpr):  # fmt: skip
    """SIZE channels of a row."""
    if FUNCTION == "gelu":
        x = gelu(x)
    elif FUNCTION == "swiglu":
        x = scaled_sigmoid(x, x) * tl.load(up_ptr + up_place + cols, mask=inside, other=0.0)
    if HADAMARD:
        x = block_hadamard(x, cols, SIZE, HADAMARD, LEVELS, SCALE)
    return x


@triton.jit
def activate_rows(rows_ptr, x_ptr, up_ptr, step_ptr, maxima_ptr, xq_ptr, xs_ptr, out_ptr, WIDTH: tl.constexpr,
                  BLOCK: tl.constexpr, FUNCTION: tl.constexpr, HADAMARD: tl.constexpr, LEVELS: tl.constexpr,
                  SCALE: tl.constexpr, PLANES: tl.constexpr, X_STRIDE: tl.constexpr, X_OFFSET: tl.constexpr,
                  UP_STRIDE: tl.constexpr, UP_OFFSET: tl.constexpr, OUT_STRIDE: tl.constexpr, OUT_OFFSET: tl.constexpr,
                  OVERLAP: tl.constexpr):  # fmt: skip
    rows = begin(rows_ptr, OVERLAP)
    row = tl.program_id(0)
    if row < rows:
        cols = tl.arange(0, BLOCK)
        inside = cols < WIDTH
        at = row.to(tl.int64)
        x = tl.load(x_ptr + at * X_STRIDE + X_OFFSET + cols, mask=inside, other=0.0)
        x = _activated(x, up_ptr, at * UP_STRIDE + UP_OFFSET, cols, inside, BLOCK, FUNCTION, HADAMARD, LEVELS, SCALE)
        if out_ptr is not None:
            tl.store(out_ptr + at * OUT_STRIDE + OUT_OFFSET + cols, x, mask=inside)
        else:
            quantize_row(x, row, cols, xq_ptr, xs_ptr, step_ptr, WIDTH, OUT_STRIDE, OUT_OFFSET, PLANES)


@triton.jit
def activate_chunks(rows_ptr, x_ptr, up_ptr, maxima_ptr, xq_ptr, xs_ptr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
                    CHUNKS: tl.constexpr, FUNCTION: tl.constexpr, HADAMARD: tl.constexpr, LEVELS: tl.constexpr,
                    SCALE: tl.constexpr, X_STRIDE: tl.constexpr, X_OFFSET: tl.constexpr, UP_STRIDE: tl.constexpr,
                    UP_OFFSET: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """A chunk of a row, in place, and its largest absolute value."""
    rows = begin(rows_ptr, OVERLAP)
    row, chunk = tl.program_id(0), tl.program_id(1)
    if row < rows:
        cols = chunk * CHUNK + tl.arange(0, CHUNK)
        inside = cols < WIDTH
        at = row.to(tl.int64)
        place = x_ptr + at * X_STRIDE + X_OFFSET + cols
        x = tl.load(place, mask=inside, other=0.0)
        x = _activated(x, up_ptr, at * UP_STRIDE + UP_OFFSET, cols, inside, CHUNK, FUNCTION, HADAMARD, LEVELS, SCALE)
        tl.store(place, x, mask=inside)
        tl.store(maxima_ptr + row * CHUNKS + chunk, largest(x))


@triton.jit
def quantize_chunks(rows_ptr, x_ptr, maxima_ptr, xq_ptr, xs_ptr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
                    ALL_CHUNKS: tl.constexpr, PLANES: tl.constexpr, DONE: tl.constexpr, X_STRIDE: tl.constexpr,
                    X_OFFSET: tl.constexpr, OUT_STRIDE: tl.constexpr, OUT_OFFSET: tl.constexpr,
                    OVERLAP: tl.constexpr):  # fmt: skip
    """A part of a row whose chunks have been activated; nothing where it is DONE."""
    rows = begin(rows_ptr, OVERLAP)
    row = tl.program_id(0)
    if not DONE:
        if row < rows:
            chunks = tl.arange(0, ALL_CHUNKS)
            absmax = largest(tl.load(maxima_ptr + row * CHUNKS + chunks, mask=chunks < CHUNKS, other=0.0))
            cols = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
            x = tl.load(x_ptr + row.to(tl.int64) * X_STRIDE + X_OFFSET + cols, mask=cols < WIDTH, other=0.0)
            quantize_by(x, absmax, row, cols, xq_ptr, xs_ptr, WIDTH, OUT_STRIDE, OUT_OFFSET, PLANES)


def _start(width: int) -> Start:
    """A block of threads has the whole row."""
    return Start((1, 1, 1), 1, warps_for(width))


def _constants(width: int, function: str, hadamard: int, planes: int, x: View, up: View | None, out: View) -> Mapping[str, Any]:
    return {
        **dict.fromkeys(("up_ptr", "step_ptr", "maxima_ptr", "xq_ptr", "xs_ptr", "out_ptr")),
        "WIDTH": width,
        "BLOCK": max(power_of_two(width), hadamard),
        "FUNCTION": function,
        "HADAMARD": hadamard,
        "LEVELS": hadamard.bit_length() - 1 if hadamard else 0,
        "SCALE": hadamard**-0.5 if hadamard else 1.0,
        "PLANES": planes,
        **of_view("X", x),
        **of_view("UP", up or View(0)),
        **of_view("OUT", out),
    }


@dataclass(frozen=True)
class Activation(Kernel, kernels.Activation):
    """A block of threads has a row; few wide rows with a scale each are split among several (`ActivateChunks`)."""

    function = activate_rows

    @property
    def chunked(self) -> bool:
        """Whether few rows are worth two steps."""
        return self.quantize and not self.step and self.width > 2 * _CHUNK

    def start(self) -> Start:
        return _start(self.width)

    def constants(self) -> Mapping[str, Any]:
        return _constants(self.width, self.activation, self.hadamard or 0, self.planes, self.x, self.up, self.out)


@dataclass(frozen=True)
class ActivateChunks(Kernel):
    """What `Activation` does with one scale for each row, in two steps, of which this is the first. Few rows are left in the
    buffer of x, with the largest value of each chunk in `maxima`; many are done at once, and `QuantizeChunks` does nothing."""

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
        """Channels of a program."""
        return max(_CHUNK, self.whole.hadamard or 0)

    @property
    def chunks(self) -> int:
        """Of a row."""
        return -(-self.whole.width // self.chunk)

    def variants(self) -> Sequence[tuple[int | None, ActivateChunks]]:
        return [(_FEW, self), (None, replace(self, chunked=False))]

    def pointers(self) -> Pointers:
        *most, xq, xs = self.whole.pointers()
        return (*most, ("maxima", "float32"), xq, xs)

    def start(self) -> Start:
        return Start((1, self.chunks, 1), 1, warps_for(self.chunk, 4)) if self.chunked else self.whole.start()

    def constants(self) -> Mapping[str, Any]:
        if not self.chunked:
            return {**self.whole.constants(), "maxima_ptr": None}
        constants = dict(self.whole.constants())
        for name in ("step_ptr", "out_ptr", "BLOCK", "PLANES", "OUT_STRIDE", "OUT_OFFSET"):
            del constants[name]
        return {**constants, "CHUNK": self.chunk, "CHUNKS": self.chunks}


@dataclass(frozen=True)
class QuantizeChunks(Kernel):
    """The second step: few rows as integers, with the scale that the largest value of all chunks gives."""

    kind: ClassVar[str] = "quantize"
    first: ActivateChunks
    done: bool = False

    function = quantize_chunks

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

    def constants(self) -> Mapping[str, Any]:
        whole = self.first.whole
        sizes = {"CHUNK": _CHUNK, "CHUNKS": self.first.chunks, "ALL_CHUNKS": power_of_two(self.first.chunks)}
        views = {**of_view("X", whole.x), **of_view("OUT", whole.out)}
        return {"WIDTH": whole.width, "PLANES": whole.planes, "DONE": self.done, **sizes, **views}


@dataclass(frozen=True)
class BlockHadamard(Kernel, kernels.BlockHadamard):
    """A block of threads has a row."""

    function = activate_rows

    def start(self) -> Start:
        return _start(self.width)

    def constants(self) -> Mapping[str, Any]:
        return _constants(self.width, "none", self.block, 1, self.x, None, self.out)


@dataclass(frozen=True)
class QuantizeTokens(Kernel, kernels.QuantizeTokens):
    """A block of threads has a row."""

    function = activate_rows

    def start(self) -> Start:
        return _start(self.width)

    def constants(self) -> Mapping[str, Any]:
        return _constants(self.width, "none", 0, self.planes, self.x, None, self.out)
