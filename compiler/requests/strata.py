"""Stratify requests by length and labels, and apportion the places of a selection among the strata."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from belle_compile.compiler.requests.request import Request

Stratum = tuple[int, tuple[str, ...]]  # (bucket of the length, values of the labels)


def bucket(length: int) -> int:
    """The bucket of a length: bucket n holds the lengths from 2**(n-1) to 2**n - 1, bucket 0 the length 0."""
    return length.bit_length()


def bucket_bounds(number: int) -> tuple[int, int]:
    """The smallest and the largest length in a bucket."""
    return (1 << number) >> 1, (1 << number) - 1


def apportion(places: int, weights: Sequence[int], most: Sequence[int]) -> list[int]:
    """Apportion `places` among strata in proportion to their weights, with at most `most[i]` places for stratum i.

    If there are enough places, each stratum gets one first. The others go one at a time to the stratum that is furthest below
    its share (Sainte-Laguë's method). All places are assigned as far as `most` allows.
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
    """The `most` requests of a stratum with the lowest priorities: a random sample if priorities are random."""

    def __init__(self, most: int) -> None:
        self.offered = 0
        self._most = most
        # The highest priority is first; line numbers differ, so that requests are never compared.
        self._heap: list[tuple[int, int, Request]] = []

    def offer(self, priority: int, request: Request) -> None:
        self.offered += 1
        entry = (-priority, -request.line, request)
        if len(self._heap) < self._most:
            heapq.heappush(self._heap, entry)
        elif entry[:2] > self._heap[0][:2]:
            heapq.heapreplace(self._heap, entry)

    def chosen(self, count: int) -> list[Request]:
        """The `count` requests with the lowest priorities, in ascending order of priority."""
        return [request for _, _, request in sorted(self._heap, key=lambda entry: entry[:2], reverse=True)[:count]]
