"""Linear kernels against their NumPy meaning: integer sums exact on every instruction set, decode and prefill alike."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from belle_compile.compiler.backends.program.kernel import View
from belle_compile.compiler.backends.program.lowering import pack_vector
from belle_compile.compiler.backends.tvm import packing
from belle_compile.compiler.backends.tvm.isa import AMX
from belle_compile.compiler.backends.tvm.kernels.base import rows_apart
from belle_compile.compiler.backends.tvm.kernels.float_linear import FloatLinear
from belle_compile.compiler.backends.tvm.kernels.quantized_linear import QuantizedLinear
from belle_compile.compiler.backends.tvm.library import compile_library
from belle_compile.compiler.ir import meanings
from tests.compiler.backends.tvm.amx_emulation import AMX_TEST_ISAS
from tests.compiler.backends.tvm.harness import HOST_ISAS, Library, aligned_copy, ints

WIDE = (11_008, meanings.MAX_INPUTS[16])  # a 7B model's widest, and the most whose sums fit in int32
SHAPES = [(100, 96), (16, 64), (150, 200), (48, 320)]  # outputs, inputs: not multiples of 16, 64 or the block of panels
ROWS = (1, 2, 5, 6, 7, 15, 16, 17, 33, 50)
ISAS = HOST_ISAS + AMX_TEST_ISAS
CAPACITY = 64  # rows of every buffer, a multiple of 32 as in engines
Array = npt.NDArray[Any]


def quantized(outputs: int, inputs: int, bias: bool = True, planes: int = 1) -> QuantizedLinear:
    x = View(planes * rows_apart(inputs, 1).stride)
    return QuantizedLinear(outputs, inputs, bias, x, rows_apart(outputs), planes)


def floating(outputs: int, inputs: int) -> FloatLinear:
    return FloatLinear(outputs, inputs, True, View.of_width(inputs), View.of_width(outputs))


@pytest.fixture(scope="module", params=ISAS, ids=lambda isa: isa.name)
def library(request: pytest.FixtureRequest) -> Library:
    kernels = [kernel for s in SHAPES for kernel in (quantized(*s), quantized(*s, planes=2), floating(*s))]
    kernels += [quantized(100, 96, False, planes) for planes in (1, 2)]
    return Library([*kernels, *(quantized(3, inputs, False, 2) for inputs in WIDE)], request.param)


def tokens(xq: Array) -> Array:
    """Planes of uint8 = int8 + 128, side by side in a row; padding and rows past the last hold whatever was there."""
    rows, inputs = xq.shape
    low = xq if xq.dtype == np.int8 else (xq.astype(np.int32) + 128) % 256 - 128
    planes = [low] if xq.dtype == np.int8 else [(xq.astype(np.int32) - low) // 256, low]
    stored = np.full((CAPACITY, len(planes), rows_apart(inputs, 1).stride), 77, np.uint8)
    for index, plane in enumerate(planes):
        assert -128 <= plane.min() and plane.max() <= 127
        stored[:rows, index, :inputs] = plane.astype(np.int32) + 128
    return aligned_copy(stored.reshape(CAPACITY, -1))


def integers(rng: np.random.Generator, planes: int, *shape: int) -> Array:
    """Random activations of the whole range."""
    limit = meanings.LIMITS[8 * planes]
    return rng.integers(-limit, limit + 1, shape).astype(np.int8 if planes == 1 else np.int16)


def run_quantized(library: Library, kernel: QuantizedLinear, xq: Array, xs: Array, wq: Array, ws: Array, bias: Array) -> Array:
    out = aligned_copy(np.zeros((CAPACITY, kernel.out.stride), np.float32))
    biases = [aligned_copy(pack_vector(bias))] if kernel.bias else []
    library.call(
        kernel, ints(len(xq)), tokens(xq), aligned_copy(xs), aligned_copy(packing.pack_int8(wq)),
        aligned_copy(pack_vector(ws)), aligned_copy(pack_vector(packing.correction(wq))), *biases, out,
    )  # fmt: skip
    return out[: len(xq), : kernel.outputs]


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_integer_sums_are_exact(library: Library, shape: tuple[int, int], planes: int) -> None:
    """With scales of one the float result is the integer sum itself, of two planes rounded once."""
    rng = np.random.default_rng(0)
    outputs, inputs = shape
    wq = rng.integers(-127, 128, shape).astype(np.int8)
    wq[0], wq[1] = 127, -128 if planes == 1 else -127  # the extremes: 16-bit pair sums must not saturate
    ones, zeros = np.ones(outputs, np.float32), np.zeros(outputs, np.float32)
    for rows in ROWS:
        xq = integers(rng, planes, rows, inputs)
        limit = meanings.LIMITS[8 * planes]
        xq[0], xq[-1, : inputs // 2] = limit, -limit
        got = run_quantized(library, quantized(*shape, planes=planes), xq, np.ones(rows, np.float32), wq, ones, zeros)
        np.testing.assert_array_equal(got, meanings.integer_linear(xq, wq).astype(np.float32), err_msg=f"{rows} rows")


@pytest.mark.parametrize("inputs", WIDE)
@pytest.mark.parametrize("rows", [1, 4, 16])
def test_sums_of_two_planes_are_exact_at_the_extremes(library: Library, inputs: int, rows: int) -> None:
    """Sums far beyond int32, and of each plane up to its end: bytes of 127 and -128 times weights of 127 and -127."""
    rng = np.random.default_rng(4)
    wq = np.full((3, inputs), 127, np.int8)
    wq[1], wq[2] = -127, np.where(np.arange(inputs) % 2, 127, -127)
    xq = integers(rng, 2, rows, inputs)
    limit, lowest = meanings.LIMITS[16], 256 * -126 - 128
    for row, value in enumerate([limit, -limit, lowest, np.where(np.arange(inputs) % 2, limit, lowest)][:rows]):
        xq[row] = value
    ones, zeros = np.ones(3, np.float32), np.zeros(3, np.float32)
    got = run_quantized(library, quantized(3, inputs, False, 2), xq, np.ones(rows, np.float32), wq, ones, zeros)
    np.testing.assert_array_equal(got, meanings.integer_linear(xq, wq).astype(np.float32))
    assert np.abs(got).max() > 2**31


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_dequantization_follows_its_meaning(library: Library, bias: bool, planes: int) -> None:
    rng = np.random.default_rng(1)
    outputs, inputs = SHAPES[0]
    wq = rng.integers(-127, 128, (outputs, inputs)).astype(np.int8)
    ws, biases = rng.random(outputs, np.float32), rng.standard_normal(outputs, np.float32)
    for rows in ROWS:
        xq = integers(rng, planes, rows, inputs)
        xs = rng.random(rows, np.float32)
        got = run_quantized(library, quantized(outputs, inputs, bias, planes), xq, xs, wq, ws, biases)
        expected = meanings.quantized_linear(xq, xs, wq, ws, biases if bias else None)
        # The kernel may fuse the last product and the sum, which saves a rounding.
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max(), err_msg=f"{rows} rows")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float_linear(library: Library, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(2)
    outputs, inputs = shape
    kernel = floating(*shape)
    weight, bias = rng.standard_normal(shape, np.float32), rng.standard_normal(outputs, np.float32)
    for rows in ROWS:
        x = rng.standard_normal((rows, inputs), np.float32)
        stored = np.full((CAPACITY, kernel.x.stride), np.nan, np.float32)
        stored[:rows, :inputs] = x
        out = aligned_copy(np.zeros((CAPACITY, kernel.out.stride), np.float32))
        library.call(kernel, ints(rows), aligned_copy(stored), aligned_copy(packing.pack_float(weight)),
                    aligned_copy(pack_vector(bias)), out)  # fmt: skip
        expected = x.astype(np.float64) @ weight.T.astype(np.float64) + bias
        np.testing.assert_allclose(out[:rows, :outputs], expected, rtol=0, atol=3e-6 * np.abs(expected).max())


@pytest.mark.parametrize("planes", [1, 2])
def test_all_instruction_sets_give_the_same_bits(planes: int) -> None:
    rng = np.random.default_rng(3)
    outputs, inputs = SHAPES[2]
    kernel = quantized(outputs, inputs, False, planes)
    wq = rng.integers(-127, 128, (outputs, inputs)).astype(np.int8)
    xq, xs = integers(rng, planes, 40, inputs), rng.random(40, np.float32)
    ws, none = rng.random(outputs, np.float32), np.zeros(outputs, np.float32)
    results = [run_quantized(Library([kernel], isa), kernel, xq, xs, wq, ws, none) for isa in ISAS]
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)


@pytest.mark.parametrize("planes", [1, 2])
def test_amx_kernels_use_the_tile_product(planes: int) -> None:
    """The library for AMX hosts, which may not run here, holds the instructions it is named for."""
    code = compile_library([quantized(64, 64, planes=planes)], AMX)
    assert b"\xc4\xe2\x78\x49" in code, "no ldtilecfg or tilerelease"
    assert any(bytes([0xC4, 0xE2, second, 0x5E]) in code for second in range(0x41, 0x80, 8)), "no tdpbusd"
