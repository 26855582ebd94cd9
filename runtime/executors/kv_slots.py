"""A KV cache of which each running sequence has its keys and values in one piece, for attention that reads no block tables.

Blocks are stored in a pool. A row of the block table has a slot, with room for the longest sequence, in which attention appends
and reads. A slot is a copy of the row's blocks: before a step, blocks are loaded that the slot does not have in their latest
version; in most steps there are none. What a step writes stays in the slot, and goes to the pool when something else needs the
block or its place in the slot. So no step copies the cache, and blocks can be shared, copied and evicted like those of a paged
cache.

The slots hold no more blocks than the pool: what a slot holds beyond that for sequences that ended is given back (`make_room`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from belle_compile.runtime.memory import anonymous, give_back
from belle_compile.runtime.program import BLOCK_SIZE

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Geometry:
    """The shape of the cache: `capacity` positions of a slot, which are whole blocks; `item_bytes` of a number."""

    layers: int
    kv_heads: int
    head_dim: int
    capacity: int
    item_bytes: int = 4

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys and values of one token, all layers together."""
        return 2 * self.item_bytes * self.layers * self.kv_heads * self.head_dim


class BlockMemory(Protocol):
    """The memory of the pool and of the slots. A slot is a row of places for blocks."""

    def copy(self, source: int, destination: int) -> None:
        """Copy a block of the pool to another one."""
        ...

    def load(self, block: int, slot: int, place: int) -> None:
        """Copy a block of the pool to a place of a slot."""
        ...

    def store(self, slot: int, place: int, block: int) -> None:
        """Copy what is at a place of a slot to a block of the pool."""
        ...


class HostBlocks:
    """Memory of the host for a pool of `blocks` blocks and `rows` slots.

    `slots` is [layers, 2, rows, kv_heads, capacity, head_dim], keys before values: neighbouring slots of a layer can be read as
    one batch. Pages take memory once they are touched.
    """

    def __init__(self, geometry: Geometry, rows: int, blocks: int) -> None:
        g = geometry
        shape = (g.layers, 2, rows, g.kv_heads, g.capacity, g.head_dim)
        memory = anonymous(rows * g.capacity * g.token_bytes, huge_pages=False)  # a short sequence touches little of its slot
        self.slots = memory[: rows * g.capacity * g.token_bytes].view(np.float32).reshape(shape)
        pool = anonymous(blocks * BLOCK_SIZE * g.token_bytes)[: blocks * BLOCK_SIZE * g.token_bytes].view(np.float32)
        self._pool = pool.reshape(blocks, g.layers, 2, g.kv_heads, BLOCK_SIZE, g.head_dim)

    def copy(self, source: int, destination: int) -> None:
        self._pool[destination] = self._pool[source]

    def load(self, block: int, slot: int, place: int) -> None:
        self._in_slot(slot, place)[:] = self._pool[block]

    def store(self, slot: int, place: int, block: int) -> None:
        self._pool[block] = self._in_slot(slot, place)

    def _in_slot(self, slot: int, place: int) -> Floats:
        """The part of a slot that a block takes: [layers, 2, kv_heads, BLOCK_SIZE, head_dim]."""
        return self.slots[:, :, slot, :, place * BLOCK_SIZE : (place + 1) * BLOCK_SIZE]


class SlottedCache:
    """Keeps a pool of `blocks` blocks, and a slot of `places` blocks for each of `rows` rows of the block table, in step with
    each other; `memory` has both."""

    def __init__(self, memory: BlockMemory, rows: int, blocks: int, places: int) -> None:
        self._memory = memory
        self._slot_of = np.arange(rows)  # by row of the block table
        self._held = np.full((rows, places), -1)  # the block at each place of a slot
        self._places_held = 0  # places with a block
        self._held_version = np.zeros_like(self._held)
        self._version = np.zeros(blocks, np.int64)  # grows when a block is written
        self._written_in = np.full((blocks, 2), -1)  # slot and place of a block that the pool does not have yet

    def slot(self, row: int) -> int:
        """The slot of a row."""
        return int(self._slot_of[row])

    def copy_block(self, source: int, destination: int) -> None:
        """Copy a block of the pool."""
        self._store(source)
        self._memory.copy(source, destination)
        self._version[destination] += 1
        self._written_in[destination] = -1

    def prepare(self, row: int, table: NDArray[np.int32], start: int, count: int) -> int:
        """Load what the slot of a row lacks of its first `start` positions, and make the blocks of the next `count` positions
        the slot's to write; `table` is the row of the block table. Returns the slot."""
        slot = self.slot(row)
        before = table[: -(-start // BLOCK_SIZE)]
        held, versions = self._held[slot, : len(before)], self._held_version[slot, : len(before)]
        for place in np.flatnonzero((held != before) | (versions != self._version[before])).tolist():
            self._load(slot, place, int(table[place]))
        for place in range(start // BLOCK_SIZE, -(-(start + count) // BLOCK_SIZE)):
            self._take(slot, place, int(table[place]))
        return slot

    def clear(self, slot: int, start: int, end: int) -> None:
        """Give up what a slot holds in blocks that begin at the positions start..end, which are about to be overwritten."""
        for place in range(-(-start // BLOCK_SIZE), -(-end // BLOCK_SIZE)):
            self._release(slot, place)

    def gather(self, rows: Sequence[int]) -> tuple[int, int]:
        """Move rows to slots that lie together, where they are scattered; returns the first of their slots and the number of
        slots up to the last one, which may hold other rows between them.

        A row that moves is loaded again by `prepare`.
        """
        slots = sorted(self.slot(row) for row in rows)
        first, span = slots[0], slots[-1] - slots[0] + 1
        if span <= 2 * len(rows):
            return first, span
        first = min(first, len(self._slot_of) - len(rows))
        window = range(first, first + len(rows))
        members = set(rows)
        row_in = {int(slot): row for row, slot in enumerate(self._slot_of)}
        free = [slot for slot in window if row_in[slot] not in members]
        for row, slot in zip([row for row in rows if self.slot(row) not in window], free, strict=True):
            self._slot_of[row_in[slot]], self._slot_of[row] = self._slot_of[row], slot
        return first, len(rows)

    def _take(self, slot: int, place: int, block: int) -> None:
        """Note that a slot writes a block."""
        if self._held[slot, place] != block:
            self._release(slot, place)
            self._held[slot, place] = block
            self._places_held += 1
        self._version[block] += 1
        self._held_version[slot, place] = self._version[block]
        self._written_in[block] = slot, place

    def _load(self, slot: int, place: int, block: int) -> None:
        self._store(block)
        self._release(slot, place)
        self._memory.load(block, slot, place)
        self._held[slot, place], self._held_version[slot, place] = block, self._version[block]
        self._places_held += 1

    def _release(self, slot: int, place: int) -> None:
        """Store the block at a place whose contents are about to be replaced, if the pool does not have it."""
        block = int(self._held[slot, place])
        if block < 0:
            return
        if (self._written_in[block] == (slot, place)).all():
            self._store(block)
        self._held[slot, place] = -1
        self._places_held -= 1

    def _store(self, block: int) -> None:
        """Copy a block from the slot in which it was written last to the pool, if the pool does not have it."""
        slot, place = self._written_in[block]
        if slot >= 0:
            self._memory.store(int(slot), int(place), block)
            self._written_in[block] = -1


class KvSlots(SlottedCache):
    """A cache in the host's memory; `slots` is that of `HostBlocks`."""

    def __init__(self, geometry: Geometry, rows: int, blocks: int) -> None:
        memory = HostBlocks(geometry, rows, blocks)
        super().__init__(memory, rows, blocks, geometry.capacity // BLOCK_SIZE)
        self.slots = memory.slots
        self.geometry, self._blocks = geometry, blocks

    def make_room(self, needed: Mapping[int, int]) -> None:
        """Have room for the first `needed` blocks of rows: if the slots held more blocks than the pool then, give back all
        others. Blocks that the pool does not have are stored first."""
        if self._places_held + sum(needed.values()) <= self._blocks:
            return
        missing = sum(count - np.count_nonzero(self._held[self.slot(row), :count] >= 0) for row, count in needed.items())
        if self._places_held + missing <= self._blocks:
            return
        for row in range(len(self._slot_of)):
            slot, kept = self.slot(row), needed.get(row, 0)
            places = kept + np.flatnonzero(self._held[slot, kept:] >= 0)
            for place in places.tolist():
                self._release(slot, place)
            if len(places):
                positions = slice(int(places[0]) * BLOCK_SIZE, (int(places[-1]) + 1) * BLOCK_SIZE)
                for layer, part, head in np.ndindex(self.geometry.layers, 2, self.geometry.kv_heads):
                    give_back(self.slots[layer, part, slot, head, positions])
