"""Packs the activation buffers of a step into one arena: buffers that never live at the same time share bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT = 64


@dataclass(frozen=True)
class Lifetime:
    """A buffer of `size` bytes, needed from call `first` to call `last` inclusive."""

    size: int
    first: int
    last: int

    def overlaps(self, other: Lifetime) -> bool:
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True)
class PlannedBuffer:
    """A buffer of `bytes` at `offset` of the arena, from call `first`, of graph node `node`, to call `last` inclusive.

    That of the logits lives for one call more than there are.
    """

    node: str
    offset: int
    bytes: int
    first: int
    last: int


@dataclass(frozen=True)
class MemoryPlan:
    """Byte offset of every buffer, in the order given, and the size of the arena."""

    offsets: tuple[int, ...]
    arena_bytes: int


def plan_memory(lifetimes: Sequence[Lifetime]) -> MemoryPlan:
    """Greedy by size: the largest buffers first, each at the lowest offset where nothing alive at the same time lies."""
    offsets: dict[int, int] = {}
    for index in sorted(range(len(lifetimes)), key=lambda i: (-lifetimes[i].size, lifetimes[i].first, i)):
        wanted = lifetimes[index]
        taken = sorted((offsets[i], offsets[i] + lifetimes[i].size) for i in offsets if lifetimes[i].overlaps(wanted))
        offset = 0
        for start, end in taken:
            if start - offset >= wanted.size:
                break
            offset = max(offset, -(-end // ALIGNMENT) * ALIGNMENT)
        offsets[index] = offset
    size = max((offsets[i] + life.size for i, life in enumerate(lifetimes)), default=0)
    return MemoryPlan(tuple(offsets[i] for i in range(len(lifetimes))), -(-size // ALIGNMENT) * ALIGNMENT)
