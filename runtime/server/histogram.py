"""A histogram that takes many values under one lock, since those of Prometheus' client take a lock for each."""

from __future__ import annotations

import math
import threading
from bisect import bisect_left
from collections.abc import Iterable, Sequence


def one_two_five(most: int) -> tuple[float, ...]:
    """The bounds 1, 2, 5, 10, 20, 50 and so on, up to `most`."""
    powers = (10**exponent for exponent in range(len(str(most))))
    return tuple(bound for power in powers for bound in (power, 2 * power, 5 * power) if bound <= most)


class Histogram:
    """Counts of values by bucket, and their sum. Bucket i has the values above bound i - 1 and up to bound i."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = (*bounds, math.inf)
        self._counts = [0] * len(self._bounds)
        self._sum = 0.0
        self._lock = threading.Lock()

    def observe(self, values: Iterable[float]) -> None:
        """Count values."""
        with self._lock:
            for value in values:
                self._counts[bisect_left(self._bounds, value)] += 1
                self._sum += value

    def cumulative(self) -> tuple[list[tuple[str, float]], float]:
        """Pairs of a bound, as Prometheus prints it, and the number of values up to it; and the sum of all values."""
        with self._lock:
            counts, total = list(self._counts), self._sum
        below, pairs = 0, []
        for bound, count in zip(self._bounds, counts, strict=True):
            below += count
            pairs.append(("+Inf" if bound == math.inf else repr(float(bound)), float(below)))
        return pairs, total
