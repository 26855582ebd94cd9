"""Elementary functions in float64, for the few values that need them.

They are written out rather than called from libm, for the same bits on every host, vectors instead of scalar calls, and kernels
that link against nothing. They are accurate to about 1e-15 over the ranges named, far beyond the float32 results made from
them.
"""

from __future__ import annotations

from math import factorial, pi, sqrt
from math import log as ln

from belle_compile.compiler.backends.tvm import tir
from belle_compile.compiler.backends.tvm.tir import Expr, T


def _constant(value: float, lanes: int) -> Expr:
    return tir.splat(T.float64(value), lanes)


def _polynomial(x: Expr, coefficients: list[float], lanes: int) -> Expr:
    """Evaluate a polynomial by Horner's rule; coefficients begin with that of the lowest power."""
    total = _constant(coefficients[-1], lanes)
    for coefficient in reversed(coefficients[:-1]):
        total = total * x + _constant(coefficient, lanes)
    return _opaque(total, lanes)


def _opaque(x: Expr, lanes: int) -> Expr:
    return tir.opaque(x, tir.with_lanes("float64", lanes))


def _rint(x: Expr, lanes: int) -> Expr:
    return tir.pure(tir.with_lanes("float64", lanes), "llvm.rint", x)


def cos_sin(angle: Expr, lanes: int) -> tuple[Expr, Expr]:
    """(cos, sin) of float32 angles up to 1e6: a multiple of pi/2 is subtracted in two parts, and the rest within +-pi/4 goes
    through Taylor's series."""
    x = tir.bind(T.cast(angle, tir.with_lanes("float64", lanes)))
    quarter_turns = _opaque(_rint(x * _constant(2 / pi, lanes), lanes), lanes)
    high, low = pi / 2, 6.123233995736766e-17
    r = _opaque(x - quarter_turns * _constant(high, lanes) - quarter_turns * _constant(low, lanes), lanes)
    square = _opaque(r * r, lanes)
    sin = _opaque(r * _polynomial(square, [(-1) ** k / factorial(2 * k + 1) for k in range(8)], lanes), lanes)
    cos = _polynomial(square, [(-1) ** k / factorial(2 * k) for k in range(9)], lanes)
    one, two, none = (tir.splat_i32(value, lanes) for value in (1, 2, 0))
    quadrant = tir.opaque(T.cast(quarter_turns, tir.int_type(lanes)), tir.int_type(lanes))

    def negated_if(bits: Expr, value: Expr) -> Expr:
        return T.Select(bits != none, _constant(0.0, lanes) - value, value)

    odd = T.bitwise_and(quadrant, one) != none
    cos, sin = _opaque(T.Select(odd, sin, cos), lanes), _opaque(T.Select(odd, cos, sin), lanes)
    return negated_if(T.bitwise_and(quadrant + one, two), cos), negated_if(T.bitwise_and(quadrant, two), sin)


def exp(x: Expr, lanes: int = 1) -> Expr:
    """e**x for |x| <= 700."""
    n = _opaque(_rint(x * _constant(1 / ln(2), lanes), lanes), lanes)
    high, low = 6.93147180369123816490e-01, 1.90821492927058770002e-10
    r = _opaque(x - n * _constant(high, lanes) - n * _constant(low, lanes), lanes)
    p = _polynomial(r, [1 / factorial(k) for k in range(14)], lanes)
    wide = tir.with_lanes("int64", lanes)
    bias, shift = tir.splat(T.int64(1023), lanes), tir.splat(T.int64(52), lanes)
    return p * T.reinterpret(tir.with_lanes("float64", lanes), T.shift_left(T.cast(n, wide) + bias, shift))


def log(x: Expr) -> Expr:
    """The natural logarithm of a positive normal number: x = m * 2**e, log m = 2 * artanh((m - 1) / (m + 1))."""
    bits = tir.opaque(T.reinterpret("int64", x))
    mantissa_bits = T.bitwise_or(T.bitwise_and(bits, T.int64((1 << 52) - 1)), T.int64(1023 << 52))
    mantissa = _opaque(T.reinterpret("float64", mantissa_bits), 1)  # in [1, 2)
    large = mantissa > T.float64(sqrt(2))
    exponent = T.shift_right(bits, T.int64(52)) - T.int64(1023) + T.cast(large, "int64")
    halved = _opaque(T.Select(large, mantissa * T.float64(0.5), mantissa), 1)
    s = _opaque((halved - T.float64(1.0)) / (halved + T.float64(1.0)), 1)
    series = _polynomial(_opaque(s * s, 1), [2 / (2 * k + 1) for k in range(12)], 1)
    return s * series + T.cast(exponent, "float64") * T.float64(ln(2))


def power(x: Expr, exponent: float) -> Expr:
    """x ** exponent for a positive x."""
    return exp(tir.bind(log(x) * T.float64(exponent)))
