"""The int4 and int6 linear kernels against its NumPy meaning, on every instruction set, decode and prefill alike."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from belle_compile.compiler.backends.program.kernel import View
from belle_compile.compiler.backends.program.lowering import pack_vector
from belle_compile.compiler.backends.tvm import packing
from belle_compile.compiler.backends.tvm.isa import AMX
from belle_compile.compiler.backends.tvm.kernels.group_linear import GroupLinear
from belle_compile.compiler.backends.tvm.library import compile_library
from belle_compile.compiler.ir import meanings
from tests.compiler.backends.tvm.harness import HOST_ISAS, Library, aligned_copy, ints

# Outputs, inputs: not multiples of 16, 64 or 128, fewer than a group, a last group of up to 64 and of more
SHAPES = [(100, 96), (16, 64), (150, 200), (48, 320), (65, 1154)]
ROWS = (1, 2, 3, 5, 6, 7, 12, 13, 40)
CAPACITY = 64
Array = npt.NDArray[Any]


def group_linear(outputs: int, inputs: int, bias: bool = True, bits: int = 4) -> GroupLinear:
    return GroupLinear(outputs, inputs, bias, View.of_width(inputs), View.of_width(outputs), bits)


@pytest.fixture(scope="module", params=HOST_ISAS, ids=lambda isa: isa.name)
def library(request: pytest.FixtureRequest) -> Library:
    kernels = [group_linear(*shape, bits=bits) for shape in SHAPES for bits in (4, 6)]
    return Library([*kernels, group_linear(*SHAPES[2], bias=False)], request.param)


def operands(shape: tuple[int, int], rows: int, seed: int = 0, bits: int = 4) -> tuple[Array, Array, Array, Array, Array]:
    """xq, xs, wq, ws, bias; first the extremes of both factors."""
    rng = np.random.default_rng(seed)
    outputs, inputs = shape
    highest = (1 << (bits - 1)) - 1
    xq, wq = rng.integers(-127, 128, (rows, inputs)), rng.integers(-highest - 1, highest + 1, shape)
    xq[0], xq[-1, : inputs // 2] = 127, -127
    wq[0], wq[1] = highest, -highest - 1
    ws = rng.normal(0, 0.01, (outputs, -(-inputs // meanings.GROUP)))
    ws[2, 0] = 0
    return (xq.astype(np.int8), rng.random(rows, np.float32), wq.astype(np.int8), ws.astype(np.float16),
            rng.standard_normal(outputs, np.float32))  # fmt: skip


def tokens(xq: Array) -> Array:
    """uint8 = int8 + 128; padding and rows past the last hold what is worst: -128 and 127."""
    stored = np.full((CAPACITY, View.of_width(xq.shape[1]).stride), 0, np.uint8)
    stored[:, 1::3] = 255
    stored[: len(xq), : xq.shape[1]] = xq.astype(np.int32) + 128
    return aligned_copy(stored)


def run(library: Library, kernel: GroupLinear, xq: Array, xs: Array, wq: Array, ws: Array, bias: Array) -> Array:
    out = aligned_copy(np.zeros((CAPACITY, kernel.out.stride), np.float32))
    biases = [aligned_copy(pack_vector(bias))] if kernel.bias else []
    pack = packing.pack_int4 if kernel.bits == 4 else packing.pack_int6
    library.call(
        kernel, ints(len(xq)), tokens(xq), aligned_copy(xs), aligned_copy(pack(wq)),
        aligned_copy(packing.pack_group_scales(ws)), *biases, out,
    )  # fmt: skip
    return out[: len(xq), : kernel.outputs]


@pytest.mark.parametrize("bits", [4, 6])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_what_its_meaning_says(library: Library, shape: tuple[int, int], bits: int) -> None:
    """To the bit: sums are exact and every rounding is the meaning's."""
    for rows in ROWS:
        xq, xs, wq, ws, bias = operands(shape, rows, bits=bits)
        got = run(library, group_linear(*shape, bits=bits), xq, xs, wq, ws, bias)
        np.testing.assert_array_equal(got, meanings.group_linear(xq, xs, wq, ws, bias), err_msg=f"{rows} rows")


def test_without_bias(library: Library) -> None:
    xq, xs, wq, ws, bias = operands(SHAPES[2], 3)
    got = run(library, group_linear(*SHAPES[2], bias=False), xq, xs, wq, ws, bias)
    np.testing.assert_array_equal(got, meanings.group_linear(xq, xs, wq, ws, None))


def test_a_row_does_not_depend_on_those_beside_it(library: Library) -> None:
    xq, xs, wq, ws, bias = operands(SHAPES[3], 40)
    together = run(library, group_linear(*SHAPES[3]), xq, xs, wq, ws, bias)
    for rows in (1, 4, 9):
        alone = run(library, group_linear(*SHAPES[3]), xq[-rows:], xs[-rows:], wq, ws, bias)
        np.testing.assert_array_equal(alone, together[-rows:])


def test_the_meaning_is_a_product_with_the_weights_that_integers_and_scales_stand_for() -> None:
    xq, xs, wq, ws, bias = operands((20, 300), 4)
    weight = wq * np.repeat(ws.astype(np.float64), meanings.GROUP, axis=1)[:, :300]
    expected = (xq * xs[:, None].astype(np.float64)) @ weight.T + bias
    np.testing.assert_allclose(
        meanings.group_linear(xq, xs, wq, ws, bias), expected, rtol=0, atol=1e-6 * np.abs(expected).max()
    )


def test_packed_weights() -> None:
    """16 outputs x 4 inputs of one step in the low halves of 64 bytes, those of the next step in the high ones."""
    wq = np.arange(20 * 70).reshape(20, 70) % 16 - 8
    packed = packing.pack_int4(wq.astype(np.int8))
    assert packed.shape == packing.int4_panels_shape(20, 70) == (2, 16, 16, 4) and packed.dtype == np.uint8
    for n, k in ((0, 0), (3, 6), (17, 69), (19, 12)):
        byte = packed[n // 16, k // 8, n % 16, k % 4]
        assert (byte >> 4 if k // 4 % 2 else byte & 15) == wq[n, k] + 8
    assert packed[1, 15, 15, 3] == 0x88, "padding is a weight of zero"


def test_packed_weights_of_6_bits() -> None:
    """In blocks of 16 inputs: two lines of low halves, and a line with the upper bits of four steps in each byte."""
    wq = (np.arange(20 * 70).reshape(20, 70) * 7 % 64 - 32).astype(np.int8)
    packed = packing.pack_int6(wq)
    assert packed.shape == packing.int6_panels_shape(20, 70) == (2, 8, 3, 16, 4) and packed.dtype == np.uint8
    for n, k in ((0, 0), (3, 6), (17, 69), (19, 12), (5, 41)):
        block, step = packed[n // 16, k // 16, :, n % 16, k % 4], k // 4 % 4
        low = block[step // 2] >> 4 if step % 2 else block[step // 2] & 15
        assert (low | (block[2] >> 2 * step & 3) << 4) == wq[n, k] + 32


def test_amx_hosts_take_the_same_kernel() -> None:
    code = compile_library([group_linear(64, 256)], AMX)
    assert b"\xc4\xe2\x78\x49" not in code, "no tile instructions"
