"""The change of low rank that an adapter makes to a linear, and its place in a slot of an executor's memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from belle_compile.runtime.program import COLUMNS, LANES, RANK_STEP, AdapterLayout, padded, rank_rows

Floats = NDArray[np.float32]


class Factors(NamedTuple):
    """b @ (a @ x + addend) is added to a linear's result for x: a [r, inputs], addend [r] and b [outputs, r], float32."""

    a: Floats
    addend: Floats
    b: Floats


class AdapterMemory:
    """The slots of an executor in which adapters are stored. A slot may be written while steps run that do not use it."""

    def __init__(self, layout: AdapterLayout, memory: NDArray[np.uint8]) -> None:
        """`memory` is a whole number of slots, all zeros."""
        self.layout = layout
        self.count = len(memory) // layout.slot_bytes
        self._changed: list[frozenset[str]] = [frozenset()] * self.count
        self._targets: dict[frozenset[int], frozenset[str]] = {}
        self._slots = memory[: self.count * layout.slot_bytes].view(np.float32).reshape(self.count, -1)

    def write(self, slot: int, changes: Mapping[str, Factors]) -> None:
        """Store the changes of an adapter, by linear; a slot holds what was stored last."""
        memory, rows = self._slots[slot], rank_rows(self.layout.rank)
        for name, region in self.layout.regions.items():
            start = region.offset // 4
            change = changes.get(name)
            memory[start] = 0
            if change is None:
                continue
            rank, used, first = len(change.a), rank_rows(len(change.a)), start + padded(1)
            second = first + rows * padded(region.inputs)
            third = second + padded(rows)
            a = np.zeros((used, padded(region.inputs)), np.float32)
            b = np.zeros((used, padded(region.outputs, COLUMNS)), np.float32)
            a[:rank, : region.inputs], b[:rank, : region.outputs] = change.a, change.b.T
            by_group = a.reshape(used // RANK_STEP, RANK_STEP, -1, LANES).transpose(0, 2, 1, 3)
            memory[first : first + a.size] = by_group.reshape(-1)
            memory[second:third] = 0
            memory[second : second + rank] = change.addend
            memory[third : third + b.size] = b.reshape(used, -1, COLUMNS).transpose(1, 0, 2).reshape(-1)
            memory[start] = used // RANK_STEP
        self._changed[slot] = frozenset(changes)
        self._targets = {}

    def targets(self, slots: frozenset[int]) -> frozenset[str]:
        """The linears that the adapters in any of the slots change."""
        targets = self._targets.get(slots)
        if targets is None:
            targets = self._targets[slots] = frozenset().union(*(self._changed[slot] for slot in slots))
        return targets

    def address(self, target: str) -> int:
        """The address of a linear's region in the first slot."""
        return int(self._slots.ctypes.data) + self.layout.regions[target].offset
