"""The vector functions of compiler/backends/tvm/tir.py, one kernel each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import ml_dtypes
import numpy as np
import pytest

from belle_compile.compiler.backends.tvm import tir
from belle_compile.compiler.backends.tvm.isa import AVX2, Isa
from belle_compile.compiler.backends.tvm.kernels.base import Kernel
from belle_compile.compiler.backends.tvm.tir import Buffer, Expr, T
from tests.compiler.backends.tvm.harness import Array, Library, aligned, aligned_copy

VECTORS = 64
FUNCTIONS: dict[str, Callable[[Expr], Expr]] = {
    "exp2": tir.exp2,
    "bits": lambda x: T.reinterpret(tir.F16, tir.bfloat16_bits(x)),
    "highest": tir.highest_lane,
    "low": lambda x: tir.of_pair(tir.bfloat16_pair(x, tir.splat(1.5)))[0],
    "high": lambda x: tir.of_pair(tir.bfloat16_pair(tir.splat(1.5), x))[1],
}


@dataclass(frozen=True)
class Apply(Kernel):
    """out = a function of x, 16 lanes at a time, by way of scratch memory that begins in the middle of a cache line if the
    stack's does."""

    kind: ClassVar[str] = "apply"
    function: str

    def pointers(self) -> tuple[tuple[str, str], ...]:
        return (("x", "float32"), ("out", "float32"), ("unaligned", "int64"))

    def body(self, isa: Isa, *buffers: Buffer) -> None:
        x, out, unaligned = buffers
        odd, scratch = tir.local(3, "uint8"), tir.local(tir.LANES)
        T.buffer_store(odd, T.uint8(1), [tir.i64(0)])

        def step(i: Expr) -> None:
            tir.store(scratch, 0, FUNCTIONS[self.function](tir.load(x, i * tir.LANES)))
            tir.store(out, i * tir.LANES, tir.load(scratch, 0))

        tir.for_range(tir.i64(VECTORS), step)
        for place, buffer in enumerate((odd, scratch)):
            where = T.address_of(buffer[tir.i64(0)])
            address = T.call_extern("int64", "memmove", where, where, tir.i64(0))  # which returns where
            tir.store(unaligned, place, T.bitwise_and(address, tir.i64(63)), 1)


def applied(isa: Isa, function: str, x: Array) -> Array:
    kernel = Apply(function)
    out, unaligned = aligned(VECTORS * tir.LANES, np.float32), aligned(2, np.int64, 1)
    Library([kernel], isa).call(kernel, aligned_copy(x, np.float32), out, unaligned)
    assert not unaligned.any(), "scratch memory does not begin with a cache line"
    return out


def test_exp2_is_near_enough_exact_at_0_and_0_far_below(isa: Isa) -> None:
    if isa == AVX2:
        pytest.skip("it is for AVX-512")
    x = np.linspace(-40, 0, VECTORS * tir.LANES, dtype=np.float32)
    x[:3] = -200, -1e30, 0
    found = applied(isa, "exp2", x)
    assert found[:3].tolist() == [0, 0, 1]
    np.testing.assert_allclose(found[3:], np.exp2(x[3:].astype(np.float64)), rtol=3e-6)


def test_bfloat16_is_rounded_to_nearest_even(isa: Isa) -> None:
    random = np.random.default_rng(0).integers(0, 1 << 32, VECTORS * tir.LANES, np.uint32)
    random[:8] = 0x3F808000, 0x3F818000, 0x3F80FFFF, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7FFFFFFF, 0x80000001
    x = random.view(np.float32)
    with np.errstate(invalid="ignore"):
        expected = x.astype(ml_dtypes.bfloat16)
    numbers = ~np.isnan(x)
    bits = applied(isa, "bits", x).view(np.uint32)
    assert (bits[numbers] == expected.view(np.uint16)[numbers]).all()
    for half in ("low", "high"):
        found = applied(isa, half, x)
        np.testing.assert_array_equal(found[numbers], expected.astype(np.float32)[numbers])
        assert np.isnan(found[~numbers]).all()


def test_the_highest_lane_is_in_all_lanes(isa: Isa) -> None:
    x = np.random.default_rng(1).standard_normal(VECTORS * tir.LANES).astype(np.float32)
    expected = np.repeat(x.reshape(VECTORS, tir.LANES).max(axis=1), tir.LANES)
    np.testing.assert_array_equal(applied(isa, "highest", x), expected)
