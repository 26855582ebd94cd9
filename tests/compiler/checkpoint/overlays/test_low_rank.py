"""Changes of low rank: a row has the same bits whichever rows are read with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from belle_compile.compiler.checkpoint import LazyTensor
from belle_compile.compiler.checkpoint.overlays import low_rank

ROWS, COLUMNS, RANK = 2500, 24, 3
Change = Callable[[LazyTensor, low_rank.Factors, str], LazyTensor]


def tensor(name: str, *shape: int) -> LazyTensor:
    values = np.random.default_rng(len(name)).standard_normal(shape).astype(np.float32)
    values.setflags(write=False)

    def load(start: int, stop: int) -> npt.NDArray[np.float32]:
        return values[start:stop]

    return LazyTensor(name, shape, "float32", Path(f"{name}.safetensors"), load)


CASES: dict[str, tuple[Change, tuple[int, int], tuple[int, int], int]] = {
    "linear": (low_rank.linear, (RANK, COLUMNS), (ROWS, RANK), ROWS),
    "embedding": (low_rank.embedding, (RANK, ROWS), (COLUMNS, RANK), COLUMNS),
}


@pytest.mark.parametrize("magnitudes", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_rows_are_those_of_the_whole(case: str, magnitudes: bool) -> None:
    change, a, b, length = CASES[case]
    base = tensor("base", ROWS, COLUMNS)
    magnitude = tensor("magnitudes", length) if magnitudes else None
    changed = change(base, low_rank.Factors(tensor("a", *a), tensor("bb", *b), 0.5, magnitude), "adapter x")
    product = tensor("bb", *b).read().astype(np.float64) @ tensor("a", *a).read()
    expected = base.read() + 0.5 * (product if case == "linear" else product.T)
    if magnitude is not None:
        axis = 1 if case == "linear" else 0
        factor = magnitude.read() / np.linalg.norm(expected, axis=axis)
        expected = expected * (factor[:, None] if case == "linear" else factor)
    whole = changed.read()
    np.testing.assert_allclose(whole, expected, rtol=2e-5, atol=2e-6)
    for start, stop in ((0, 1), (3, 1030), (1024, 1025), (1023, 2500), (2499, 2500), (7, 7)):
        np.testing.assert_array_equal(changed.rows(start, stop), whole[start:stop])
    assert changed.describe() == "adapter x <- base.safetensors: base"


def test_replaced_rows() -> None:
    base, values = tensor("base", ROWS, COLUMNS), tensor("values", 2, COLUMNS)
    changed = low_rank.replaced_rows(base, {9: 1, 1500: 0}, values, "adapter x")
    expected = base.read().copy()
    expected[[9, 1500]] = values.read()[[1, 0]]
    np.testing.assert_array_equal(changed.read(), expected)
    np.testing.assert_array_equal(changed.rows(1400, 1501), expected[1400:1501])
