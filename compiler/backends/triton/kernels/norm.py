"""Layer and RMS normalization, with the residual addition before and the quantization after in the same pass; RMS normalization
of each head."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from belle_compile.compiler.backends.program import kernels
from belle_compile.compiler.backends.triton.kernels.base import Kernel, Start, power_of_two, warps_for
from belle_compile.compiler.backends.triton.kernels.device import await_earlier, begin, let_next_start, quantize_row


@triton.jit
def norm_rows(rows_ptr, x_ptr, r_ptr, scale_ptr, bias_ptr, total_ptr, step_ptr, xq_ptr, xs_ptr, out_ptr, SHAPE: tl.constexpr,
              OVERLAP: tl.constexpr):  # fmt: skip
    let_next_start(OVERLAP)
    rows = tl.load(rows_ptr)
    cols = tl.arange(0, SHAPE.padded)
    inside = cols < SHAPE.width
    scale = tl.load(scale_ptr + cols, mask=inside, other=0.0)
    bias = tl.zeros((SHAPE.padded,), tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + cols, mask=inside, other=0.0)
    await_earlier(OVERLAP)
    row = tl.program_id(0)
    if row < rows:
        at = row.to(tl.int64)
        x = tl.load(x_ptr + at * SHAPE.x.stride + SHAPE.x.offset + cols, mask=inside, other=0.0)
        if r_ptr is not None:
            x += tl.load(r_ptr + at * SHAPE.r.stride + SHAPE.r.offset + cols, mask=inside, other=0.0)
        if total_ptr is not None:
            tl.store(total_ptr + at * SHAPE.total.stride + SHAPE.total.offset + cols, x, mask=inside)
        if SHAPE.norm == "layer":
            x = tl.where(inside, x - tl.sum(x, axis=0) / SHAPE.width, 0.0)
        variance = tl.sum(x * x, axis=0) / SHAPE.width
        x = x * tl.div_rn(1.0, tl.sqrt_rn(variance + SHAPE.epsilon)) * scale + bias
        if out_ptr is not None:
            tl.store(out_ptr + at * SHAPE.out.stride + SHAPE.out.offset + cols, x, mask=inside)
        else:
            quantize_row(x, row, cols, xq_ptr, xs_ptr, step_ptr, SHAPE)


@dataclass(frozen=True)
class Norm(Kernel, kernels.Norm):
    """Each program computes one row."""

    function = norm_rows

    @property
    def padded(self) -> int:
        """Columns that a program holds, a power of two."""
        return power_of_two(self.width)

    def start(self) -> Start:
        return Start((1, 1, 1), 1, warps_for(self.width))


@triton.jit
def norm_heads(rows_ptr, x_ptr, scale_ptr, out_ptr, SHAPE: tl.constexpr, OVERLAP: tl.constexpr):
    rows = begin(rows_ptr, OVERLAP)
    row = tl.program_id(0)
    if row < rows:
        at, first = row.to(tl.int64), tl.program_id(1) * SHAPE.head_dim
        cols = tl.arange(0, SHAPE.padded)
        inside = cols < SHAPE.head_dim
        x = tl.load(x_ptr + at * SHAPE.x.stride + SHAPE.x.offset + first + cols, mask=inside, other=0.0)
        scale = tl.load(scale_ptr + cols, mask=inside, other=0.0)
        mean_square = tl.sum(x * x, axis=0) / SHAPE.head_dim
        x = x * tl.div_rn(1.0, tl.sqrt_rn(mean_square + SHAPE.epsilon)) * scale
        tl.store(out_ptr + at * SHAPE.out.stride + SHAPE.out.offset + first + cols, x, mask=inside)


@dataclass(frozen=True)
class HeadNorm(Kernel, kernels.HeadNorm):
    """Each program normalizes a head of one row."""

    function = norm_heads

    @property
    def padded(self) -> int:
        """Channels that a program holds, a power of two."""
        return power_of_two(self.head_dim)

    def start(self) -> Start:
        return Start((1, self.width // self.head_dim, 1), 1, warps_for(self.head_dim))
