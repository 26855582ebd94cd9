"""Layer and RMS normalization, with the residual addition before and the quantization after in the same pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from belle_compile.compiler.backends.program import kernels
from belle_compile.compiler.backends.program.kernel import View
from belle_compile.compiler.backends.triton.kernels.base import Kernel, Start, of_view, power_of_two, warps_for
from belle_compile.compiler.backends.triton.kernels.device import await_earlier, let_next_start, quantize_row


@triton.jit
def norm_rows(rows_ptr, x_ptr, r_ptr, scale_ptr, bias_ptr, total_ptr, step_ptr, xq_ptr, xs_ptr, out_ptr, WIDTH: tl.constexpr,
              BLOCK: tl.constexpr, EPSILON: tl.constexpr, CENTRED: tl.constexpr, PLANES: tl.constexpr, X_STRIDE: tl.constexpr,
              X_OFFSET: tl.constexpr, R_STRIDE: tl.constexpr, R_OFFSET: tl.constexpr, TOTAL_STRIDE: tl.constexpr,
              TOTAL_OFFSET: tl.constexpr, OUT_STRIDE: tl.constexpr, OUT_OFFSET: tl.constexpr,
              OVERLAP: tl.constexpr):  # fmt: skip
    let_next_start(OVERLAP)
    rows = tl.load(rows_ptr)
    cols = tl.arange(0, BLOCK)
    inside = cols < WIDTH
    scale = tl.load(scale_ptr + cols, mask=inside, other=0.0)
    bias = tl.zeros((BLOCK,), tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + cols, mask=inside, other=0.0)
    await_earlier(OVERLAP)
    row = tl.program_id(0)
    if row < rows:
        at = row.to(tl.int64)
        x = tl.load(x_ptr + at * X_STRIDE + X_OFFSET + cols, mask=inside, other=0.0)
        if r_ptr is not None:
            x += tl.load(r_ptr + at * R_STRIDE + R_OFFSET + cols, mask=inside, other=0.0)
        if total_ptr is not None:
            tl.store(total_ptr + at * TOTAL_STRIDE + TOTAL_OFFSET + cols, x, mask=inside)
        if CENTRED:
            x = tl.where(inside, x - tl.sum(x, axis=0) / WIDTH, 0.0)
        variance = tl.sum(x * x, axis=0) / WIDTH
        x = x * tl.div_rn(1.0, tl.sqrt_rn(variance + EPSILON)) * scale + bias
        if out_ptr is not None:
            tl.store(out_ptr + at * OUT_STRIDE + OUT_OFFSET + cols, x, mask=inside)
        else:
            quantize_row(x, row, cols, xq_ptr, xs_ptr, step_ptr, WIDTH, OUT_STRIDE, OUT_OFFSET, PLANES)


@dataclass(frozen=True)
class Norm(Kernel, kernels.Norm):
    """A block of threads has a row."""

    function = norm_rows

    def start(self) -> Start:
        return Start((1, 1, 1), 1, warps_for(self.width))

    def constants(self) -> Mapping[str, Any]:
        absent = dict.fromkeys(("r_ptr", "bias_ptr", "total_ptr", "step_ptr", "xq_ptr", "xs_ptr", "out_ptr"))
        constants = {"WIDTH": self.width, "BLOCK": power_of_two(self.width), "EPSILON": self.epsilon, "PLANES": self.planes}
        views = {"X": self.x, "R": self.r or View(0), "TOTAL": self.total or View(0), "OUT": self.out}
        placed = {key: value for name, view in views.items() for key, value in of_view(name, view).items()}
        return {**absent, **constants, **placed, "CENTRED": self.norm == "layer"}
