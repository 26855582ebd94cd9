"""Kernel calls with sums by messages in between, for ranks on several hosts. On one host a sum is a call like any other."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from belle_compile.runtime.distributed.collectives import Collectives
from belle_compile.runtime.executors.native import CallList, FailedCall, ThreadPool


class Sum:
    """Rows of a buffer that are replaced by their sum over ranks. The number of rows is read at each run."""

    def __init__(self, buffer: NDArray[np.float32], width: int, count: NDArray[np.int32]) -> None:
        """`buffer` is [most rows, stride], of which `width` columns are summed; `count` [1] is the number of rows."""
        self._buffer, self._width, self._count = buffer, width, count
        self._parts: dict[int, NDArray[np.float32]] = {}

    def run(self, collectives: Collectives) -> None:
        rows = int(self._count[0])
        part = self._parts.get(rows)
        if part is None:
            part = self._buffer[:rows, : self._width]
            if part.flags.c_contiguous:
                part = part.reshape(-1)
            self._parts[rows] = part
        collectives.all_reduce(part)


class SummedLists:
    """A `CallList` with sums among its calls; the kernel calls between two sums are one list."""

    def __init__(self, pool: ThreadPool, calls: Sequence[tuple[int, Sequence[int]] | Sum], collectives: Collectives) -> None:
        """`calls` are sums, or the address of a kernel and those of its arguments."""
        self._collectives = collectives
        self._times = np.zeros(len(calls) + 1, np.int64)
        self._parts: list[tuple[int, int, CallList | Sum]] = []  # number of the first call, and of the one after the last
        kernels: list[tuple[int, Sequence[int]]] = []
        for number, call in enumerate([*calls, None]):
            if kernels and not isinstance(call, tuple):
                self._parts.append((number - len(kernels), number, CallList(pool, kernels)))
                kernels = []
            if isinstance(call, Sum):
                self._parts.append((number, number + 1, call))
            elif call is not None:
                kernels.append(call)

    def run(self) -> None:
        """Make the calls in order; raises `FailedCall` at the first that fails."""
        for first, _, part in self._parts:
            if isinstance(part, Sum):
                part.run(self._collectives)
                continue
            try:
                part.run()
            except FailedCall as failed:
                raise FailedCall(first + failed.number, failed.message) from None

    def run_timed(self) -> NDArray[np.int64]:
        """As `run`. Returns the nanoseconds, int64 [calls + 1], at which the first call began and each ended, valid until the
        next run."""
        times = self._times
        times[0] = time.monotonic_ns()  # the clock of `CallList.run_timed`
        for first, end, part in self._parts:
            if isinstance(part, Sum):
                part.run(self._collectives)
                times[end] = time.monotonic_ns()
                continue
            try:
                times[first + 1 : end + 1] = part.run_timed()[1:]
            except FailedCall as failed:
                raise FailedCall(first + failed.number, failed.message) from None
        return times
