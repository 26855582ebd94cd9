"""Rotary position embedding: the table of cosines and sines of a step, and the rotation of one head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from belle_compile.compiler.backends.program import kernels
from belle_compile.compiler.backends.tvm import tir
from belle_compile.compiler.backends.tvm.isa import Isa
from belle_compile.compiler.backends.tvm.kernels import float64
from belle_compile.compiler.backends.tvm.kernels.base import Kernel, rows_apart
from belle_compile.compiler.backends.tvm.kernels.rowwise import Values, each
from belle_compile.compiler.backends.tvm.tir import Buffer, Expr, T


@dataclass(frozen=True)
class RotaryTable(Kernel, kernels.RotaryTable):
    """Angles are float32 as in torch; their cosines are computed in float64, so that no libm is needed. The larger base of a
    long sequence has the roundings of transformers.modeling_rope_utils._compute_dynamic_ntk_parameters."""

    def body(self, isa: Isa, *buffers: Buffer) -> None:
        rows_pointer, positions, sequences, inv_freq, cos_sin = buffers
        rows = tir.rows_of(rows_pointer)
        half = self.head_dim // 2

        def table(row: Expr) -> None:
            position = tir.bind(T.cast(positions[row], "float32"))
            start = tir.bind(rows_apart(self.head_dim).row(row))

            def write(frequencies: Values) -> None:
                def both(c: Expr, lanes: int) -> None:
                    angle = tir.bind(tir.splat(position, lanes) * frequencies(c, lanes))
                    scaling = tir.splat(self.attention_scaling, lanes)
                    for offset, value in zip((0, half), float64.cos_sin(angle, lanes), strict=True):
                        tir.store(cos_sin, start + offset + c, T.cast(value, tir.float_type(lanes)) * scaling, lanes)

                each(half, both)

            def static() -> None:
                write(lambda c, lanes: tir.load(inv_freq, c, lanes))

            if not self.dynamic_factor:
                static()
                return
            length = tir.scalar(T.int32(0), "int32")

            def longest(other: Expr) -> None:
                with tir.when(sequences[other] == sequences[row]):
                    length[0] = T.max(length[0], positions[other] + 1)

            tir.for_range(rows, longest)
            tir.either(length[0] > self.original_max, lambda: write(self._grown_frequencies(tir.bind(length[0]))), static)

        tir.for_rows(rows, table)

    def _grown_frequencies(self, length: Expr) -> Values:
        """inv_freq for a sequence of `length` tokens: 1 / base ** (2i / head_dim) with the grown base."""
        factor, dim = self.dynamic_factor, self.head_dim
        growth = T.cast(length, "float32") * T.float32(factor) / T.float32(self.original_max) - T.float32(factor - 1)
        grown = T.cast(float64.power(T.cast(tir.bind(growth), "float64"), dim / (dim - 2)), "float32")
        log_base = tir.bind(float64.log(T.cast(tir.bind(T.float32(self.base) * grown), "float64")))

        def frequencies(c: Expr, lanes: int) -> Expr:
            exponent = T.cast(tir.lane_numbers(c * 2, 1), "float32") if lanes == 1 else T.cast(
                T.ramp(T.cast(c * 2, "int32"), T.int32(2), lanes), tir.float_type(lanes))  # fmt: skip
            exponent = tir.bind(exponent / tir.splat(float(dim), lanes))
            logarithm = T.cast(exponent, tir.with_lanes("float64", lanes)) * tir.splat(log_base, lanes)
            power = T.cast(float64.exp(logarithm, lanes), tir.float_type(lanes))
            return tir.splat(1.0, lanes) / power

        return frequencies


Write = Callable[[Expr, int, Expr], None]  # called with (first column, lanes, values)


def rotate_head(head_dim: int, values: Values, table: Buffer | None, row: Expr, write: Write) -> None:
    """Call `write(column, lanes, value)` for one head of q or k, rotated by halves as in HF LLaMA unless `table` is None."""
    if table is None:
        each(head_dim, lambda c, lanes: write(c, lanes, values(c, lanes)))
        return
    half = head_dim // 2
    start = tir.bind(rows_apart(head_dim).row(row))

    def pair(c: Expr, lanes: int) -> None:
        low, high = tir.bind(values(c, lanes)), tir.bind(values(c + half, lanes))
        cos, sin = tir.bind(tir.load(table, start + c, lanes)), tir.bind(tir.load(table, start + half + c, lanes))
        write(c, lanes, tir.fma(low, cos, high * (sin * tir.splat(-1.0, lanes)), lanes))
        write(c + half, lanes, tir.fma(high, cos, low * sin, lanes))

    each(half, pair)
