"""Weights that their checkpoint holds as integers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from belle_compile.compiler.ir.quantized import QuantizedRows, QuantizedTensor


def rows(*, zero_points: bool, offsets: bool) -> QuantizedRows:
    """Five rows of two groups of four."""
    random = np.random.default_rng(3)
    return QuantizedRows(
        random.integers(-8, 8, (5, 8), np.int8),
        random.standard_normal((5, 2)).astype(np.float16),
        random.integers(-8, 8, (5, 2), np.int8) if zero_points else None,
        random.standard_normal((5, 2)).astype(np.float16) if offsets else None,
    )


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("offsets", [False, True])
def test_dequantized_value_by_value(zero_points: bool, offsets: bool) -> None:
    held = rows(zero_points=zero_points, offsets=offsets)
    values = held.dequantized()
    assert values.dtype == np.float32 and values.shape == (5, 8)
    for n, k in np.ndindex(5, 8):
        at = n, k // 4
        zero = np.float32(held.zero_points[at]) if held.zero_points is not None else np.float32(0)
        offset = np.float32(held.offsets[at]) if held.offsets is not None else np.float32(0)
        assert values[n, k] == (np.float32(held.integers[n, k]) - zero) * np.float32(held.scales[at]) + offset


def test_rows_are_read_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    held = rows(zero_points=True, offsets=False)
    asked = []

    def load(start: int, stop: int) -> QuantizedRows:
        asked.append((start, stop))
        assert held.zero_points is not None
        return QuantizedRows(held.integers[start:stop], held.scales[start:stop], held.zero_points[start:stop])

    tensor = QuantizedTensor((5, 8), 4, 4, load)
    monkeypatch.setattr("belle_compile.compiler.ir.quantized.BLOCK_ELEMENTS", 16)
    np.testing.assert_array_equal(tensor.numpy(), held.dequantized())
    assert asked == [(0, 2), (2, 4), (4, 5)]
    np.testing.assert_array_equal(tensor.rows(1, 4), held.dequantized()[1:4])
    np.testing.assert_array_equal(tensor.read().integers, held.integers)
    assert tensor.rows(2, 2).shape == (0, 8) and tensor.axis == 1


def test_inputs_in_an_order_of_their_own() -> None:
    plain = rows(zero_points=True, offsets=True)
    ordered = replace(plain, group_of=np.array([1, 0, 0, 1, 1, 0, 1, 0]))
    values = ordered.dequantized()
    assert plain.zero_points is not None and plain.offsets is not None and ordered.group_of is not None
    for n, k in np.ndindex(5, 8):
        at = n, ordered.group_of[k]
        shifted = np.float32(plain.integers[n, k]) - np.float32(plain.zero_points[at])
        assert values[n, k] == shifted * np.float32(plain.scales[at]) + np.float32(plain.offsets[at])


@pytest.mark.parametrize("by_inputs", [False, True])
def test_outputs_in_another_order(by_inputs: bool) -> None:
    held = rows(zero_points=True, offsets=False)

    def load(start: int, stop: int) -> QuantizedRows:
        grid = held.grid.taken(np.arange(start, stop))
        return QuantizedRows(held.integers[start:stop], grid.scales, grid.zero_points)

    order = np.array([3, 0, 4, 1, 2])
    tensor = QuantizedTensor((5, 8), 4, 4, load, by_inputs=by_inputs).reordered(order)
    np.testing.assert_array_equal(tensor.numpy(), held.dequantized()[order])
    np.testing.assert_array_equal(tensor.rows(1, 4), held.dequantized()[order[1:4]])
    assert tensor.rows(2, 2).shape == (0, 8)
    assert held.zero_points is not None
    np.testing.assert_array_equal(tensor.grid().zero_points, held.zero_points[order])
