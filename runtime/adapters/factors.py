"""The change of low rank that an adapter makes to a linear, and its place in a slot of an executor's memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from belle_compile.runtime.program import (
    COLUMNS,
    LANES,
    RANK_STEP,
    AdapterLayout,
    AdapterRegion,
    RegionParts,
    padded,
    rank_rows,
)

Floats = NDArray[np.float32]
BetweenSteps = Callable[[Callable[[], None]], None]  # runs a function on the thread of steps while none runs


def _at_once(function: Callable[[], None]) -> None:
    function()


class Factors(NamedTuple):
    """b @ (a @ x + addend) is added to a linear's result for x: a [r, inputs], addend [r] and b [outputs, r], float32."""

    a: Floats
    addend: Floats
    b: Floats


class AdapterSlots(ABC):
    """The `count` slots of an executor in which adapters are stored. Their addresses do not change. A slot may be written while
    steps run that do not use it."""

    def __init__(self, layout: AdapterLayout, count: int) -> None:
        self.layout, self.count = layout, count
        self._changed: list[frozenset[str]] = [frozenset()] * self.count
        self._targets: dict[frozenset[int], frozenset[str]] = {}

    def write(self, slot: int, changes: Mapping[str, Factors], between_steps: BetweenSteps = _at_once) -> None:
        """Store the changes of an adapter, by linear; a slot holds what was stored last. `between_steps` is for slots that only
        the thread of steps can write; the default is for a caller on this thread."""
        self._store(slot, changes, between_steps)
        self._changed[slot] = frozenset(changes)
        self._targets = {}

    def targets(self, slots: frozenset[int]) -> frozenset[str]:
        """The linears that the adapters in any of the slots change."""
        targets = self._targets.get(slots)
        if targets is None:
            targets = self._targets[slots] = frozenset().union(*(self._changed[slot] for slot in slots))
        return targets

    @abstractmethod
    def address(self, target: str) -> int:
        """The address of a linear's region in the first slot."""

    @abstractmethod
    def _store(self, slot: int, changes: Mapping[str, Factors], between_steps: BetweenSteps) -> None:
        """Write the changes to a slot."""


class AdapterMemory(AdapterSlots):
    """Slots in the host's memory, which are written in place."""

    def __init__(self, layout: AdapterLayout, memory: NDArray[np.uint8]) -> None:
        """`memory` is a whole number of slots, all zeros."""
        super().__init__(layout, len(memory) // layout.slot_bytes)
        self._slots = memory[: self.count * layout.slot_bytes].reshape(self.count, -1)

    def address(self, target: str) -> int:
        return int(self._slots.ctypes.data) + self.layout.regions[target].offset

    def _store(self, slot: int, changes: Mapping[str, Factors], between_steps: BetweenSteps) -> None:
        write_slot(self.layout, self._slots[slot], changes)


def write_slot(layout: AdapterLayout, slot: NDArray[np.uint8], changes: Mapping[str, Factors]) -> None:
    """Write the changes of an adapter, by linear, to the bytes of a slot, and that there is none to the other regions."""
    for name, region in layout.regions.items():
        parts = RegionParts.of(layout.rank, region.inputs, region.outputs, region.dtype)
        memory = slot[region.offset : region.offset + parts.end]
        memory[: parts.scale] = 0
        if change := changes.get(name):
            _write(memory, parts, region, change)


def _write(memory: NDArray[np.uint8], parts: RegionParts, region: AdapterRegion, change: Factors) -> None:
    """Write a change to the region's memory, and the number of its groups last."""
    rank, used, dtype = len(change.a), rank_rows(len(change.a)), np.dtype(region.dtype)
    a = np.zeros((used, padded(region.inputs)), np.float32)
    b = np.zeros((used, padded(region.outputs, COLUMNS)), np.float32)
    vectors = np.zeros((2, (parts.a - parts.scale) // 8), np.float32)
    of_a, of_b = _exponents(change.a), _exponents(change.b.T)
    a[:rank, : region.inputs] = np.ldexp(change.a, -of_a[:, None])
    b[:rank, : region.outputs] = np.ldexp(change.b.T, -of_b[:, None])
    vectors[:, :rank] = np.ldexp(np.float32(1), of_a + of_b), np.ldexp(change.addend, of_b)
    by_group = a.reshape(used // RANK_STEP, RANK_STEP, -1, LANES).transpose(0, 2, 1, 3)
    by_column = b.reshape(used, -1, COLUMNS).transpose(1, 0, 2)
    memory[parts.scale : parts.a].view(np.float32)[:] = vectors.reshape(-1)
    memory[parts.a : parts.a + a.size * dtype.itemsize].view(dtype)[:] = by_group.reshape(-1)
    memory[parts.b : parts.b + b.size * dtype.itemsize].view(dtype)[:] = by_column.reshape(-1)
    memory[:4].view(np.float32)[0] = used // RANK_STEP


def _exponents(rows: Floats) -> NDArray[np.int32]:
    """For each row the exponent of the smallest power of two above its magnitudes; 0 for zeros."""
    exponents: NDArray[np.int32] = np.frexp(np.abs(rows).max(axis=1, initial=0))[1]
    return exponents
