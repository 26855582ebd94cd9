"""Pack the activation buffers of a step into one arena; buffers that are never alive at the same time may share bytes."""

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
    """A buffer of `bytes` at `offset` of the arena, alive from call `first`, which belongs to graph node `node`, to call `last`
    inclusive. `last` is the number of calls for a buffer that is read after the step, such as the logits."""

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
    """Place the largest buffers first, each at the lowest offset at which it overlaps no buffer that is alive at the same
    time."""
    offsets: dict[int, int] = {}
    for index in sorted(range(len(lifetimes)), key=lambda i: (-lifetimes[i].size, lifetimes[i].first, i)):
        buffer = lifetimes[index]
        taken = sorted((offsets[i], offsets[i] + lifetimes[i].size) for i in offsets if lifetimes[i].overlaps(buffer))
        offset = 0
        for start, end in taken:
            if start - offset >= buffer.size:
                break
            offset = max(offset, -(-end // ALIGNMENT) * ALIGNMENT)
        offsets[index] = offset
    size = max((offsets[i] + life.size for i, life in enumerate(lifetimes)), default=0)
    return MemoryPlan(tuple(offsets[i] for i in range(len(lifetimes))), -(-size // ALIGNMENT) * ALIGNMENT)
