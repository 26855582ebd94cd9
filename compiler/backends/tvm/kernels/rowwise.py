"""Helpers of row-wise kernels: loops over a row, reductions, and the quantization of a row."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle

from belle_compile.compiler.backends.program.kernel import View
from belle_compile.compiler.backends.tvm import tir
from belle_compile.compiler.backends.tvm.tir import Buffer, Expr, T
from belle_compile.compiler.ir.meanings import LIMITS

CHAINS = 4  # independent accumulators of a reduction, enough to hide the latency of an addition
Values = Callable[[Expr, int], Expr]  # (first column, lanes) -> as many values of the row


def each(width: int, body: Callable[[Expr, int], None]) -> None:
    """Call `body(column, lanes)` over a row: 16 lanes at a time, then one by one."""
    tir.for_width(width, lambda c: body(c, tir.LANES), lambda c: body(c, 1))


def absolute(value: Expr, lanes: int = tir.LANES) -> Expr:
    """|value|"""
    return tir.pure(tir.float_type(lanes), "llvm.fabs", value)


def row_sum(width: int, values: Values) -> Expr:
    """The sum of a row, always in the same order."""
    acc = tir.Registers(CHAINS, tir.F16, tir.splat(0.0))
    rest = tir.scalar(0.0)
    chain = cycle(range(CHAINS))

    def vector(column: Expr) -> None:
        slot = next(chain)
        acc[slot] = acc[slot] + values(column, tir.LANES)

    def tail(column: Expr) -> None:
        rest[0] = rest[0] + values(column, 1)

    tir.for_width(width, vector, tail, unroll=CHAINS)
    total = (acc[0] + acc[1]) + (acc[2] + acc[3])
    return tir.bind(tir.sum_lanes(total) + rest[0])


class AbsMax:
    """The largest magnitude of a row, found while another loop passes over it."""

    def __init__(self) -> None:
        self._highest = tir.Registers(CHAINS, tir.F16, tir.splat(0.0))
        self._rest = tir.scalar(0.0)
        self._chain = cycle(range(CHAINS))

    def take(self, value: Expr, lanes: int = tir.LANES) -> None:
        """Emit the comparison with `lanes` values, 16 or one."""
        highest, slot = (self._rest, 0) if lanes == 1 else (self._highest, next(self._chain))
        highest[slot] = T.max(highest[slot], absolute(value, lanes))

    def value(self) -> Expr:
        """The largest magnitude, as a scalar."""
        highest = tir.highest_lane(tir.pairwise([self._highest[i] for i in range(CHAINS)], T.max))
        return tir.bind(T.max(T.Shuffle([highest], [T.int32(0)]), self._rest[0]))


def row_absmax(width: int, values: Values) -> Expr:
    """The largest magnitude in a row."""
    highest = AbsMax()
    tir.for_width(width, lambda c: highest.take(values(c, tir.LANES)), lambda c: highest.take(values(c, 1), 1), unroll=CHAINS)
    return highest.value()


def inverse_scale(absmax: Expr, lanes: int = 1, limit: float = 127.0) -> Expr:
    """The factor that converts values to integers: limit / absmax, or 0 for a row of zeros."""
    zero = tir.splat(0.0, lanes)
    return tir.bind(T.Select(absmax > zero, tir.splat(limit, lanes) / absmax, zero))


def quantize_row(
    width: int,
    values: Values,
    xq: Buffer,
    out: View,
    row: Expr,
    xs: Buffer,
    planes: int = 1,
    step: Buffer | None = None,
    absmax: Expr | None = None,
) -> None:
    """belle::QuantizeTokens for one row: integers rint(value * limit / absmax) and the scale absmax / limit; with a `step`,
    integers rint(value / step) clamped to the limit, and the step as scale. `absmax` is computed here unless it is known.

    8 bits are stored as one byte, integer + 128. 16 bits are two: integer = 256 * high + low with both signed; the row has
    the bytes high + 128 in its first half and low + 128 in its second.
    """
    start, limit = tir.bind(out.row(row)), float(LIMITS[8 * planes])
    if step is None:
        absmax = row_absmax(width, values) if absmax is None else absmax
        inverse, scale = inverse_scale(absmax, limit=limit), absmax / T.float32(limit)
    else:
        scale = tir.bind(tir.load(step, tir.i64(0), 1))
        inverse = tir.bind(T.float32(1.0) / scale)
    tir.store(xs, row, scale, 1)

    def write(column: Expr, lanes: int) -> None:
        rounded = tir.rint(values(column, lanes) * tir.splat(inverse, lanes), lanes)
        if step is not None:
            rounded = T.max(T.min(rounded, tir.splat(limit, lanes)), tir.splat(-limit, lanes))
        integer = T.cast(rounded, tir.int_type(lanes))
        byte = tir.with_lanes("uint8", lanes)
        if planes == 1:
            tir.store(xq, start + column, T.cast(integer + tir.splat_i32(128, lanes), byte), lanes)
            return
        biased = tir.bind(integer + tir.splat_i32(256 * 128 + 128, lanes))  # 256 * (high + 128) + (low + 128)
        for plane, shift in enumerate((8, 0)):
            bits = T.bitwise_and(T.shift_right(biased, tir.splat_i32(shift, lanes)), tir.splat_i32(255, lanes))
            tir.store(xq, start + out.stride // planes * plane + column, T.cast(bits, byte), lanes)

    each(width, write)
