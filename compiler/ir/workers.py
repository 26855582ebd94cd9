"""Work on several threads at a time, each with a share of the processor's cores."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let ops of torch use this many threads while a `with` block runs: those of this thread, and of threads that it starts."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_order(function: Callable[[int], T], count: int, workers: int, cores: int) -> Iterator[T]:
    """Yield `function` of 0 to `count` - 1 in order; `workers` of them are computed at a time, on equal shares of the `cores`.

    Ops on one core each do not wait for other cores at their end, which takes longer than many an op where another process has
    some of these cores. What an op computes on one core does not depend on how many there are.
    """
    with torch_threads(max(1, cores // workers)):
        if workers == 1:
            yield from map(function, range(count))
            return
        pending: deque[Future[T]] = deque()
        with ThreadPoolExecutor(workers) as pool:
            try:
                for index in range(count):
                    pending.append(pool.submit(function, index))
                    if len(pending) >= 2 * workers:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                for future in pending:
                    future.cancel()
