"""Strata: requests of about the same length and with the same labels, and how many places each gets in the selection."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from belle_compile.compiler.requests.request import Request

Stratum = tuple[int, tuple[str, ...]]  # bucket of the length, values of the labels


def bucket(length: int) -> int:
    """The number of a length's bucket; bucket n holds the lengths from 2**(n-1) to 2**n - 1, bucket 0 the length 0."""
    return length.bit_length()


def bucket_bounds(number: int) -> tuple[int, int]:
    """The least and the greatest length in a bucket."""
    return (1 << number) >> 1, (1 << number) - 1


def apportion(places: int, weights: Sequence[int], most: Sequence[int]) -> list[int]:
    """How many of `places` each stratum gets, in proportion to its weight and never more than its `most`.

    Each gets one where there are places for all; the others go one at a time to the stratum that is furthest below its share
    (Sainte-Laguë's method). All places are given away, as far as `most` allows.
    """
    able = [stratum for stratum, cap in enumerate(most) if cap > 0 and weights[stratum] > 0]
    given = [0] * len(weights)
    if places >= len(able):
        for stratum in able:
            given[stratum] = 1
    queue = [(-weights[stratum] / (2 * given[stratum] + 1), stratum) for stratum in able if given[stratum] < most[stratum]]
    heapq.heapify(queue)
    for _ in range(places - sum(given)):
        if not queue:
            break
        _, stratum = heapq.heappop(queue)
        given[stratum] += 1
        if given[stratum] < most[stratum]:
            heapq.heappush(queue, (-weights[stratum] / (2 * given[stratum] + 1), stratum))
    return given


class Sample:
    """Of all requests of a stratum the `most` with the least priorities: a random sample if those are random."""

    def __init__(self, most: int) -> None:
        self.offered = 0
        self._most = most
        self._heap: list[tuple[int, int, Request]] = []  # the greatest priority first; lines differ, so requests never compare

    def offer(self, priority: int, request: Request) -> None:
        self.offered += 1
        entry = (-priority, -request.line, request)
        if len(self._heap) < self._most:
            heapq.heappush(self._heap, entry)
        elif entry[:2] > self._heap[0][:2]:
            heapq.heapreplace(self._heap, entry)

    def chosen(self, count: int) -> list[Request]:
        """The `count` requests of the least priorities, in the order of these."""
        return [request for _, _, request in sorted(self._heap, key=lambda entry: entry[:2], reverse=True)[:count]]
