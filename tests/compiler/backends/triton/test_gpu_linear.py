"""Linear kernels beside their NumPy meaning, interpreted: every tile that an engine carries."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("triton")

import torch
import triton
import triton.language as tl

from belle_compile.compiler.backends.program.kernel import View
from belle_compile.compiler.backends.triton.kernels import linear
from belle_compile.compiler.backends.triton.kernels.linear import FloatLinear, QuantizedLinear, Tile, held
from belle_compile.compiler.backends.triton.lower import pad_rows
from belle_compile.compiler.ir import meanings
from tests.compiler.backends.triton.harness import Array, call, floats, garbage, language_patched_once, place, taken

RANDOM = np.random.default_rng(5)
TILES = (
    Tile(1, 4, 64, dots=True), Tile(4, 8, 32, dots=True), Tile(1, 4, 128, dots=True), Tile(4, 4, 128, dots=True),
    Tile(16, 16, 64), Tile(16, 32, 32, 3), Tile(32, 16, 64, 2),
    Tile(16, 64, 128, 1, 8),
)  # fmt: skip


def quantized(rows: int, inputs: int, planes: int) -> tuple[Array, Array, Array]:
    """Integers, their planes as an activation of its own lies in memory, and scales."""
    limit = meanings.LIMITS[8 * planes]
    xq = RANDOM.integers(-limit, limit + 1, (rows, inputs)).astype(np.int8 if planes == 1 else np.int16)
    stride = -(-inputs // 64) * 64
    high = (xq.astype(np.int32) + 128) >> 8
    parts = [xq] if planes == 1 else [high, xq - 256 * high]
    packed = garbage((rows + 4, planes * stride), np.int8)
    for plane, part in enumerate(parts):
        packed[:rows, plane * stride : plane * stride + inputs] = part
    return xq, packed, np.abs(floats(rows + 4)) / 100


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("shape", [(40, 128), (19, 72)], ids=str)
def test_every_tile_computes_the_exact_sum(
    tile: Tile, planes: int, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "_TILES", ((None, (tile,)),))  # which workspaces are made for
    outputs, inputs = shape
    rows = min(tile.rows, 3) if tile.dots else tile.rows + 2
    xq, packed, xs = quantized(rows, inputs, planes)
    wq, ws, bias = RANDOM.integers(-127, 128, shape).astype(np.int8), np.abs(floats(outputs)) / 50, floats(outputs)
    if planes == 1:
        wq[0], wq[2, ::3] = -128, -128  # as integers of a checkpoint may be; with 16 bits they are quantized again
    kernel = QuantizedLinear(outputs, inputs, True, View(packed.shape[1]), View(64, 3), planes, tile, native=False)
    if tile.splits > 1:  # a workspace for one row of tiles, as few rows have
        rows, xq = tile.rows, xq[: tile.rows]
    out = garbage((rows + 4, 64))
    call(kernel, rows, packed, xs, pad_rows(wq, packed.shape[1] // planes), ws, bias, out, launched=rows + 3)
    expected = meanings.quantized_linear(xq, xs[:rows], wq, ws, bias)
    np.testing.assert_allclose(taken(out, kernel.out, rows, outputs), expected, rtol=1e-6, atol=1e-6)
    out[:rows, 3 : 3 + outputs] = np.nan
    assert np.isnan(out).all(), "something else was written"


def test_sums_that_leave_no_room_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest products of 16-bit activations, whose total does not fit in 32 bits."""
    inputs = 4096
    wq = np.full((16, inputs), 127, np.int8)
    xq = np.full((1, inputs), 32_639, np.int16)
    packed = np.full((1, 2 * inputs), 127, np.int8)
    for tile in (Tile(1, 8, 1024, dots=True), Tile(16, 16, 256, 4), Tile(16, 16, 256)):
        monkeypatch.setattr(linear, "_TILES", ((None, (tile,)),))
        kernel, out = QuantizedLinear(16, inputs, False, View(2 * inputs), View(64), 2, tile, native=False), garbage((1, 64))
        call(kernel, 1, packed, np.ones(1, np.float32), wq, np.ones(16, np.float32), out)
        expected = meanings.quantized_linear(xq, np.ones(1, np.float32), wq, np.ones(16, np.float32), None)
        np.testing.assert_array_equal(out[:, :16], expected)


@triton.jit
def copy_held(w_ptr, out_ptr, EARLY: tl.constexpr, BN: tl.constexpr, WORDS: tl.constexpr):
    places = (tl.program_id(0) * BN + tl.arange(0, BN))[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    there = (tl.arange(0, WORDS) < WORDS - 3)[None, :]
    tl.store(out_ptr + places, held(w_ptr + places, there, EARLY))


@pytest.mark.parametrize("shape", [(1, 8), (4, 16), (2, 64)])
def test_weights_are_the_same_when_they_are_asked_for_in_pieces(shape: tuple[int, int]) -> None:
    """As the first two of four programs do."""
    weights = RANDOM.integers(-(2**31), 2**31, (4, *shape)).astype(np.int32)
    found = torch.full(weights.shape, 7, dtype=torch.int32)
    with language_patched_once():
        copy_held[(4,)](torch.from_numpy(weights), found, 2, *shape)
    expected = weights.copy()
    expected[..., -3:] = 0
    np.testing.assert_array_equal(found.numpy(), expected)


def test_variants_cover_all_rows_and_have_the_same_arguments() -> None:
    for outputs, inputs in ((4096, 4096), (250880, 64), (64, 24)):
        kernel = QuantizedLinear(outputs, inputs, False, View(4096), View(4096))
        bounds = [bound for bound, _ in kernel.variants()]
        assert bounds[-1] is None and bounds[:-1] == sorted(bounds[:-1])
        for bound, variant in kernel.variants():
            for one in (variant, *variant.alternatives()):
                assert one.pointers() == kernel.pointers() and one.workspaces() == kernel.workspaces()
                assert not one.tile.dots or (bound is not None and one.tile.rows >= bound), "rows that it does not have"
                splits = one.tile.splits == 1 or (bound is not None and one.tile.rows >= bound)
                assert splits, "one row of tiles is all that the workspace has room for"


@pytest.mark.parametrize("shape", [(40, 64), (19, 70)], ids=str)
def test_float_linear(shape: tuple[int, int]) -> None:
    outputs, inputs = shape
    x, w, bias = floats(35, inputs), floats(outputs, inputs), floats(outputs)
    for biases in ([bias], []):
        kernel, out = FloatLinear(outputs, inputs, bool(biases), View(160, 9), View(128, 1)), garbage((35, 128))
        call(kernel, 35, place(x, kernel.x), pad_rows(w, -(-inputs // 16) * 16), *biases, out)
        expected = meanings.linear(x, w, biases[0] if biases else None)
        np.testing.assert_allclose(taken(out, kernel.out, 35, outputs), expected, rtol=1e-4, atol=1e-4)


def test_names_tell_kernels_apart() -> None:
    kernel = QuantizedLinear(64, 64, False, View(64), View(64))
    others = [replace(kernel, planes=2), replace(kernel, tile=TILES[0]), replace(kernel, bias=True)]
    assert len({one.name for one in [kernel, *others]}) == 4
