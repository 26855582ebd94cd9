"""The best logits of each row, interpreted: none of those that sampling may want is missing."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("triton")

from belle_compile.compiler.backends.program.kernel import View
from belle_compile.compiler.backends.triton.kernels.candidates import CAPACITY, ChunkMaxima, Collect
from tests.compiler.backends.triton.harness import Array, call, floats, garbage, place

COUNT = 20_000  # of more than one program


def candidates(logits: Array, wanted: list[int]) -> list[tuple[int, Array, Array]]:
    """(count, places, values) of each row."""
    rows, view = len(logits), View(-(-logits.shape[1] // 64) * 64)
    maxima = ChunkMaxima(logits.shape[1], view)
    kept, counts = garbage((rows + 1, maxima.chunks)), garbage(rows + 1, np.int32)
    places, values = garbage((rows + 1, CAPACITY), np.int32), garbage((rows + 1, CAPACITY))
    buffer = place(logits, view, 1)
    call(maxima, rows, buffer, kept, counts, launched=rows + 1)
    asked = np.array([*wanted, 7], np.int32)
    call(Collect(logits.shape[1], view), rows, asked, buffer, kept, counts, places, values, launched=rows + 1)
    assert counts[rows] == 99
    return [(int(count), places[row, :count], values[row, :count]) for row, count in enumerate(counts[:rows])]


def test_all_that_reach_the_kth_largest_are_found() -> None:
    logits = floats(4, COUNT)
    logits[1] = np.round(logits[1])  # ties
    logits[2] -= 100
    logits[3, ::7] = -np.inf
    wanted = [1, 3, 17, 19]
    for row, (count, places, values), most in zip(logits, candidates(logits, wanted), wanted, strict=True):
        least = np.sort(row)[-most]
        expected = np.flatnonzero(row >= least)
        assert set(expected) <= set(places.tolist()) and len(set(places.tolist())) == count
        np.testing.assert_array_equal(values, row[places])


def test_few_are_found_for_the_best_one() -> None:
    ((count, *_),) = candidates(floats(1, COUNT), [1])
    assert count == 1


def test_what_is_no_number_is_found_too() -> None:
    logits = floats(2, COUNT)
    logits[0, 17], logits[1, COUNT - 1] = np.nan, np.inf
    (_, first, values), (_, second, _) = candidates(logits, [1, 2])
    assert 17 in first and np.isnan(values[first.tolist().index(17)])
    assert COUNT - 1 in second


def test_all_are_wanted_or_too_many() -> None:
    flat = np.zeros((2, COUNT), np.float32)
    (count, *_), (many, *_) = candidates(flat, [0, 1])
    assert count > CAPACITY and many == COUNT
