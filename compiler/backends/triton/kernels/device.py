"""Functions that kernels share: rounding, quantization of a row, nonlinearities, the Hadamard transform."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Adding and then subtracting this number rounds a float32 below 2^22 to an integer, half to even.
_ROUND = tl.constexpr(12582912.0)


@triton.jit
def let_next_start(OVERLAP: tl.constexpr):
    """Allow the next kernel to start; called first in every kernel. The next kernel starts once all programs have called this,
    and waits for their results by itself."""
    if OVERLAP:
        gdc_launch_dependents()


@triton.jit
def await_earlier(OVERLAP: tl.constexpr):
    """Wait until earlier kernels of the step have written their results. Before this call, only weights, inputs of the step and
    results of earlier steps may be touched. Every program must call this: the next kernel waits for this one alone, and would
    otherwise not wait for those before it."""
    if OVERLAP:
        gdc_wait()


@triton.jit
def begin(rows_ptr, OVERLAP: tl.constexpr):
    """Call `let_next_start` and `await_earlier`, for a kernel that prefetches nothing; returns the number of rows of the
    step."""
    let_next_start(OVERLAP)
    rows = tl.load(rows_ptr)
    await_earlier(OVERLAP)
    return rows


@triton.jit
def rint(x):
    """The nearest integer as a float, halves to even."""
    return (x + _ROUND) - _ROUND


@triton.jit
def largest(x):
    """The largest absolute value; NaN if any element is NaN or infinite (tl.max alone would skip NaN)."""
    return tl.max(tl.abs(x), axis=0) + tl.sum(x * 0.0, axis=0)


@triton.jit
def quantize_row(x, row, cols, xq_ptr, xs_ptr, step_ptr, SHAPE: tl.constexpr):
    """Write a row (zeros beyond its width) as 8 bits for each plane, and its scale, as `meanings.quantize_tokens` defines."""
    if step_ptr is not None:
        LIMIT: tl.constexpr = 127.0 if SHAPE.planes == 1 else 32639.0
        scale = tl.load(step_ptr)
        tl.store(xs_ptr + row, scale)
        rounded = rint(tl.minimum(tl.maximum(x * tl.div_rn(1.0, scale), -LIMIT), LIMIT)).to(tl.int32)
        write_planes(rounded, row, cols, xq_ptr, SHAPE)
    else:
        quantize_by(x, largest(x), row, cols, xq_ptr, xs_ptr, SHAPE)


@triton.jit
def quantize_by(x, absmax, row, cols, xq_ptr, xs_ptr, SHAPE: tl.constexpr):
    """Like `quantize_row`, for some columns of a row whose largest absolute value is known."""
    LIMIT: tl.constexpr = 127.0 if SHAPE.planes == 1 else 32639.0
    tl.store(xs_ptr + row, tl.div_rn(absmax, LIMIT))
    inverse = tl.where(absmax > 0, tl.div_rn(LIMIT, tl.where(absmax > 0, absmax, 1.0)), 0.0)
    write_planes(rint(x * inverse).to(tl.int32), row, cols, xq_ptr, SHAPE)


@triton.jit
def write_planes(rounded, row, cols, xq_ptr, SHAPE: tl.constexpr):
    """Write integers as bytes: one plane, or those of high and of low bits."""
    out = xq_ptr + row.to(tl.int64) * SHAPE.out.stride + SHAPE.out.offset + cols
    inside = cols < SHAPE.width
    if SHAPE.planes == 1:
        tl.store(out, rounded.to(tl.int8), mask=inside)
    else:
        high = (rounded + 128) >> 8
        tl.store(out, high.to(tl.int8), mask=inside)
        tl.store(out + SHAPE.out.stride // SHAPE.planes, (rounded - 256 * high).to(tl.int8), mask=inside)


@triton.jit
def scaled_sigmoid(x, argument):
    """x * sigmoid(argument); exp(-argument) = inf gives the right limit, 0."""
    return tl.div_rn(x, 1.0 + tl.exp(-argument))


@triton.jit
def gelu(x):
    """0.5 x (1 + tanh(u)) = x * sigmoid(2 u), u = sqrt(2 / pi) * (x + 0.044715 x^3)."""
    return scaled_sigmoid(x, x * (1.5957691216057308 + 0.07135481627159668 * (x * x)))


@triton.jit
def golay_signs(cols, BLOCK: tl.constexpr):
    """The signs +1 and -1 of `meanings.golay_signs`, in blocks: the parity of the pairs of neighbouring ones among the bits of
    an element's index."""
    place = cols % BLOCK
    pairs = place & (place >> 1)
    pairs ^= pairs >> 8
    pairs ^= pairs >> 4
    pairs ^= pairs >> 2
    pairs ^= pairs >> 1
    return 1.0 - 2.0 * (pairs & 1).to(tl.float32)


@triton.jit
def block_hadamard(x, cols, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Transform a row of SIZE elements, a power of two, as `meanings.block_hadamard` defines: signs first, then butterflies,
    beginning with those of direct neighbours."""
    levels: tl.constexpr = BLOCK.bit_length() - 1
    x = x * golay_signs(cols, BLOCK)
    for level in tl.static_range(levels):
        pairs = tl.permute(tl.reshape(x, [SIZE // 2 ** (level + 1), 2, 2**level]), [0, 2, 1])
        first, second = tl.split(pairs)
        x = tl.reshape(tl.permute(tl.join(first + second, first - second), [0, 2, 1]), [SIZE])
    return x * BLOCK**-0.5
