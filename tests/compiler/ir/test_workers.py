"""Results of workers come in order, and torch's threads are afterwards as many as before."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from belle_compile.compiler.ir.workers import in_order, torch_threads


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_order_whichever_is_first(workers: int) -> None:
    threads: set[int] = set()

    def square(number: int) -> int:
        threads.add(threading.get_ident())
        time.sleep(0.002 * (number % 3 == 0))
        return number * number

    assert list(in_order(square, 20, workers, workers)) == [number * number for number in range(20)]
    assert (threading.get_ident() in threads) == (workers == 1) and len(threads) <= workers


@pytest.mark.parametrize(("workers", "cores", "share"), [(1, 4, 4), (2, 4, 2), (3, 4, 1), (5, 4, 1)])
def test_workers_share_the_cores(workers: int, cores: int, share: int) -> None:
    with torch_threads(7):
        assert set(in_order(lambda _: torch.get_num_threads(), 9, workers, cores)) == {share}
        assert torch.get_num_threads() == 7


def test_at_most_twice_as_many_results_wait_as_there_are_workers() -> None:
    begun: list[int] = []
    results = in_order(lambda number: begun.append(number), 100, 2, 2)
    next(results)
    time.sleep(0.05)
    assert len(begun) <= 4
    results.close()  # type: ignore[attr-defined]
    assert len(begun) < 100


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_ends_the_others(workers: int) -> None:
    before, begun = torch.get_num_threads(), list[int]()

    def fail(number: int) -> None:
        begun.append(number)
        if number == 3:
            raise ValueError("the third")

    with pytest.raises(ValueError, match="the third"):
        list(in_order(fail, 100, workers, workers))
    assert len(begun) < 20 and torch.get_num_threads() == before
