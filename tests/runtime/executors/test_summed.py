"""Lists of kernel calls with sums in between, over kernels that count."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("tvm")

from belle_compile.runtime.executors.native import FailedCall, KernelLibrary, ThreadPool
from belle_compile.runtime.executors.summed import Sum, SummedLists
from tests.runtime.executors.test_native import Counter, library  # noqa: F401  (a fixture)


class Doubling:
    """As if one other rank had the same values."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def all_reduce(self, values: np.ndarray) -> None:
        self.seen.append(values.shape)
        values *= 2


@pytest.fixture
def pool(library: KernelLibrary) -> Any:  # noqa: F811
    pool = ThreadPool(library, 1)
    yield pool
    pool.close()


def test_calls_and_sums_run_in_order(library: KernelLibrary, pool: ThreadPool) -> None:  # noqa: F811
    counter, count = Counter(library, "count", 8), np.array([1], np.int32)
    buffer = counter.out[:32].view(np.int32).reshape(4, 8)
    numbers = np.zeros((4, 8), np.float32)
    both, others = Sum(numbers, 8, count), Doubling()
    lists = SummedLists(pool, [both, counter.call, counter.call, both, both, counter.call], others)  # type: ignore[arg-type]
    numbers[:] = 1
    lists.run()
    assert (buffer[0] == 3).all() and (numbers[0] == 8).all() and (numbers[1:] == 1).all()
    times = lists.run_timed()
    assert len(times) == 7 and (np.diff(times) > 0).all() and (buffer[0] == 6).all()
    count[0] = 3
    numbers[:] = 1
    lists.run()
    assert (numbers[:3] == 8).all() and (numbers[3] == 1).all()
    assert set(others.seen) == {(8,), (24,)}


def test_columns_that_are_not_summed_stay(library: KernelLibrary, pool: ThreadPool) -> None:  # noqa: F811
    numbers, others = np.ones((4, 8), np.float32), Doubling()
    SummedLists(pool, [Sum(numbers, 6, np.array([2], np.int32))], others).run()  # type: ignore[arg-type]
    assert (numbers[:2, :6] == 2).all() and numbers.sum() == 32 + 12 and others.seen == [(2, 6)]


def test_a_call_that_fails_has_its_number(library: KernelLibrary, pool: ThreadPool) -> None:  # noqa: F811
    counter, numbers = Counter(library, "count", 8), np.ones((1, 8), np.float32)
    bad, one = (counter.call[0], counter.call[1][:1]), Sum(numbers, 8, np.array([1], np.int32))
    lists = SummedLists(pool, [counter.call, one, counter.call, bad, one], Doubling())  # type: ignore[arg-type]
    for run in (lists.run, lists.run_timed):
        with pytest.raises(FailedCall, match="call 3: ") as failed:
            run()
        assert failed.value.number == 3
    assert (numbers == 4).all()
