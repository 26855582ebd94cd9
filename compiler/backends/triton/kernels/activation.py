"""The nonlinearities of the feed-forward layers, Hadamard transforms, and the quantization of what they give."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import triton
import triton.language as tl

from compiler.backends.kernel import View
from compiler.backends.triton.kernels.base import Kernel, Start, of_view, power_of_two, warps_for
from compiler.backends.triton.kernels.device import block_hadamard, gelu, quantize_row, scaled_sigmoid


@triton.jit
def activate_rows(rows_ptr, x_ptr, up_ptr, step_ptr, xq_ptr, xs_ptr, out_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
                  FUNCTION: tl.constexpr, HADAMARD: tl.constexpr, LEVELS: tl.constexpr, SCALE: tl.constexpr,
                  PLANES: tl.constexpr, X_STRIDE: tl.constexpr, X_OFFSET: tl.constexpr, UP_STRIDE: tl.constexpr,
                  UP_OFFSET: tl.constexpr, OUT_STRIDE: tl.constexpr, OUT_OFFSET: tl.constexpr):  # fmt: skip
    row = tl.program_id(0)
    if row < tl.load(rows_ptr):
        cols = tl.arange(0, BLOCK)
        inside = cols < WIDTH
        at = row.to(tl.int64)
        x = tl.load(x_ptr + at * X_STRIDE + X_OFFSET + cols, mask=inside, other=0.0)
        if FUNCTION == "gelu":
            x = gelu(x)
        elif FUNCTION == "swiglu":
            x = scaled_sigmoid(x, x) * tl.load(up_ptr + at * UP_STRIDE + UP_OFFSET + cols, mask=inside, other=0.0)
        if HADAMARD:
            x = block_hadamard(x, cols, BLOCK, HADAMARD, LEVELS, SCALE)
        if out_ptr is not None:
            tl.store(out_ptr + at * OUT_STRIDE + OUT_OFFSET + cols, x, mask=inside)
        else:
            quantize_row(x, row, cols, xq_ptr, xs_ptr, step_ptr, WIDTH, OUT_STRIDE, OUT_OFFSET, PLANES)


def _start(width: int) -> Start:
    """A block of threads has the whole row."""
    return Start((1, 1, 1), 1, warps_for(width))


def _constants(width: int, function: str, hadamard: int, planes: int, x: View, up: View | None, out: View) -> Mapping[str, Any]:
    return {
        **dict.fromkeys(("up_ptr", "step_ptr", "xq_ptr", "xs_ptr", "out_ptr")),
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
class Activation(Kernel):
    """out = gelu(x) (`activation` "gelu", tanh form), or silu(x) * up ("swiglu", with the view `up`).

    With `quantize`, the result has 8 bits for each of `planes`, with `step` at that one scale. With `hadamard`, blocks of so
    many channels are transformed before.
    """

    kind: ClassVar[str] = "activation"
    activation: str
    width: int
    quantize: bool
    x: View
    up: View | None
    out: View
    planes: int = 1
    hadamard: int | None = None
    step: bool = False

    function = activate_rows

    def pointers(self) -> tuple[tuple[str, str], ...]:
        up = (("up", "float32"),) if self.up else ()
        out = (("xq", "int8"), ("xs", "float32")) if self.quantize else (("out", "float32"),)
        step = (("step", "float32"),) if self.step else ()
        return (("rows", "int32"), ("x", "float32"), *up, *step, *out)

    def start(self) -> Start:
        return _start(self.width)

    def constants(self) -> Mapping[str, Any]:
        return _constants(self.width, self.activation, self.hadamard or 0, self.planes, self.x, self.up, self.out)


@dataclass(frozen=True)
class BlockHadamard(Kernel):
    """Blocks of each row, transformed."""

    kind: ClassVar[str] = "hadamard"
    width: int
    block: int
    x: View
    out: View

    function = activate_rows

    def pointers(self) -> tuple[tuple[str, str], ...]:
        return (("rows", "int32"), ("x", "float32"), ("out", "float32"))

    def start(self) -> Start:
        return _start(self.width)

    def constants(self) -> Mapping[str, Any]:
        return _constants(self.width, "none", self.block, 1, self.x, None, self.out)


@dataclass(frozen=True)
class QuantizeTokens(Kernel):
    """Each row as integers with a scale of its own; with `step`, that is the scale."""

    kind: ClassVar[str] = "quantize"
    width: int
    x: View
    out: View
    planes: int = 1
    step: bool = False

    function = activate_rows

    def pointers(self) -> tuple[tuple[str, str], ...]:
        step = (("step", "float32"),) if self.step else ()
        return (("rows", "int32"), ("x", "float32"), *step, ("xq", "int8"), ("xs", "float32"))

    def start(self) -> Start:
        return _start(self.width)

    def constants(self) -> Mapping[str, Any]:
        return _constants(self.width, "none", 0, self.planes, self.x, None, self.out)
