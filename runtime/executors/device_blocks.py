"""What executors keep in a GPU's memory beside their model: a KV cache of slots and blocks, and the inputs of a run."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from belle_compile.runtime.executors.device import Box, Device, Pitches
from belle_compile.runtime.executors.kv_memory import KvMemory
from belle_compile.runtime.executors.kv_slots import Geometry
from belle_compile.runtime.host import GPU_RESERVE_BYTES
from belle_compile.runtime.program import BLOCK_SIZE

_ALIGNMENT = 256  # bytes, of the addresses of inputs
Shapes = Mapping[str, tuple[type[np.signedinteger[Any]], tuple[int, ...]]]


class DeviceInputs:
    """Arrays that the host fills in and a run reads, with a place in the device's memory; one copy moves them all."""

    def __init__(self, shapes: Shapes, device: Device) -> None:
        """`shapes` maps names to types and shapes."""
        places, size = {}, 0
        for name, (dtype, shape) in shapes.items():
            places[name] = size
            size += -(-prod(shape) * np.dtype(dtype).itemsize // _ALIGNMENT) * _ALIGNMENT
        self._device, self._host, self._base = device, device.host_memory(size), device.allocate(size, "inputs")
        self.addresses = {name: self._base + place for name, place in places.items()}
        self.arrays: dict[str, NDArray[np.signedinteger[Any]]] = {}
        for name, (dtype, shape) in shapes.items():
            data = self._host[places[name] :][: prod(shape) * np.dtype(dtype).itemsize]
            self.arrays[name] = data.view(dtype).reshape(shape)

    def upload(self) -> None:
        """Enqueue the copy of all arrays to the device."""
        self._device.upload(self._base, self._host)


class DeviceBlocks:
    """Memory of a GPU for a pool of blocks, [blocks, layers, 2, kv_heads, BLOCK_SIZE, head_dim], and for the slots, [layers, 2,
    rows, kv_heads, capacity, head_dim]. It is zeroed, so that attention multiplies what it does not see by 0."""

    def __init__(self, geometry: Geometry, rows: int, blocks: int, device: Device) -> None:
        self._geometry, self._rows, self._device = geometry, rows, device
        self._head = geometry.head_dim * geometry.item_bytes
        self._block_bytes = geometry.token_bytes * BLOCK_SIZE
        self._slot_bytes = geometry.kv_heads * geometry.capacity * self._head  # of one layer, of keys or values
        self._slots = device.allocate(rows * geometry.capacity * geometry.token_bytes, "the KV cache")
        self._pool = device.allocate(blocks * self._block_bytes, "the KV cache")

    def address(self, layer: int, part: int, slot: int) -> int:
        """The address of a slot's keys (`part` 0) or values (1) of a layer; those of the next slots follow."""
        return self._slots + ((2 * layer + part) * self._rows + slot) * self._slot_bytes

    def copy(self, source: int, destination: int) -> None:
        self._device.copy(self._in_pool(destination), self._in_pool(source), self._block_bytes)

    def load(self, block: int, slot: int, place: int) -> None:
        target, source = self._in_slot(slot, place), self._in_pool(block)
        self._device.copy_box(target, self._slot_pitches, source, self._pool_pitches, self._box)

    def store(self, slot: int, place: int, block: int) -> None:
        target, source = self._in_pool(block), self._in_slot(slot, place)
        self._device.copy_box(target, self._pool_pitches, source, self._slot_pitches, self._box)

    @property
    def _box(self) -> Box:
        """A block as layers and parts, heads, and bytes that lie together."""
        return 2 * self._geometry.layers, self._geometry.kv_heads, BLOCK_SIZE * self._head

    @property
    def _slot_pitches(self) -> Pitches:
        """Heads from a layer's part to the next one, and bytes from a head to the next one."""
        return self._rows * self._geometry.kv_heads, self._geometry.capacity * self._head

    @property
    def _pool_pitches(self) -> Pitches:
        return self._geometry.kv_heads, BLOCK_SIZE * self._head

    def _in_pool(self, block: int) -> int:
        return self._pool + block * self._block_bytes

    def _in_slot(self, slot: int, place: int) -> int:
        return self.address(0, 0, slot) + place * BLOCK_SIZE * self._head


def pool_blocks(
    geometry: Geometry, rows: int, most: int, kv_memory: KvMemory, device: Device, model: tuple[str, int], stage: str
) -> int:
    """The number of blocks of the pool, by default what the rest of the device's memory holds and `most` at most.

    `model` is what lies in the memory beside the cache, and its bytes. Raises `EngineError` where the cache does not fit.
    """
    slots, block = rows * geometry.capacity * geometry.token_bytes, geometry.token_bytes * BLOCK_SIZE
    name, size = model
    free = device.memory_bytes - size - slots - GPU_RESERVE_BYTES
    if kv_memory == KvMemory():
        if free >= block:
            return min(free // block, most)
        kv_memory = KvMemory(tokens=BLOCK_SIZE)  # the least
    beside = f"the {name} ({size / 2**30:.2f} GiB) and the slots ({slots / 2**30:.2f} GiB) on {device.name}"
    blocks = kv_memory.blocks(stage, free, beside, block)
    assert blocks is not None, "a size is asked for"
    return blocks
