"""The nonlinearities of the feed-forward layers, with the quantization of their result in the same pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import pi, sqrt
from typing import ClassVar

from belle_compile.compiler.backends.program import kernels
from belle_compile.compiler.backends.tvm import tir
from belle_compile.compiler.backends.tvm.isa import Isa
from belle_compile.compiler.backends.tvm.kernels.base import Kernel
from belle_compile.compiler.backends.tvm.kernels.hadamard import transform_row
from belle_compile.compiler.backends.tvm.kernels.rowwise import AbsMax, each, quantize_row
from belle_compile.compiler.backends.tvm.tir import Buffer, Expr


@dataclass(frozen=True)
class Activation(Kernel, kernels.Activation):
    """One thread activates, transforms and quantizes a row in one pass."""

    initials: ClassVar[Mapping[str, str]] = {"activation": "f"}

    def body(self, isa: Isa, *buffers: Buffer) -> None:
        assert (self.activation, self.up is None) in (("gelu", True), ("swiglu", False)), self
        named = self.named(buffers)

        def activate(row: Expr) -> None:
            starts = {"x": tir.bind(self.x.row(row))}
            if self.up is not None:
                starts["up"] = tir.bind(self.up.row(row))

            def value(c: Expr, lanes: int) -> Expr:
                x, *up = (tir.bind(tir.load(named[name], start + c, lanes)) for name, start in starts.items())
                return _silu(x, lanes) * up[0] if up else _gelu(x, lanes)

            kept, start = (tir.local(self.width), tir.i64(0)) if self.quantize else (named["out"], tir.bind(self.out.row(row)))
            highest = AbsMax() if self.hadamard and self.quantize and not self.step else None
            if self.hadamard:
                on_result = highest.take if highest else None
                transform_row(self.width, self.hadamard, lambda c: value(c, tir.LANES), kept, start, on_result)
            else:
                each(self.width, lambda c, lanes: tir.store(kept, start + c, value(c, lanes), lanes))
            if self.quantize:
                quantize_row(self.width, lambda c, lanes: tir.load(kept, c, lanes), named["xq"], self.out, row, named["xs"],
                             self.planes, named.get("step"), highest.value() if highest else None)  # fmt: skip

        tir.for_rows(tir.rows_of(named["rows"]), activate)


def _scaled_sigmoid(x: Expr, argument: Expr, lanes: int) -> Expr:
    """x * sigmoid(argument). tir.exp stays finite, so the quotient does too."""
    return x / (tir.splat(1.0, lanes) + tir.exp(tir.splat(0.0, lanes) - argument, lanes))


def _silu(x: Expr, lanes: int) -> Expr:
    return _scaled_sigmoid(x, x, lanes)


def _gelu(x: Expr, lanes: int) -> Expr:
    """0.5 * x * (1 + tanh(u)) = x * sigmoid(2 * u) with u = sqrt(2/pi) * (x + 0.044715 * x**3)"""
    linear, cubic = 2 * sqrt(2 / pi), 2 * sqrt(2 / pi) * 0.044715
    return _scaled_sigmoid(x, x * (tir.splat(linear, lanes) + tir.splat(cubic, lanes) * (x * x)), lanes)
