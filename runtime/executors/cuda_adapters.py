"""The slots of adapters in a GPU's memory."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np

from belle_compile.runtime.adapters.factors import AdapterSlots, BetweenSteps, Factors, write_slot
from belle_compile.runtime.executors.device import Bytes, Device
from belle_compile.runtime.program import AdapterLayout

_PIECE = 8 << 20  # bytes that are copied between two steps, which takes less than a millisecond


class DeviceAdapterMemory(AdapterSlots):
    """Slots in memory that is allocated once, so that recorded steps find them where they were. A slot is copied in pieces on
    the device's stream, each between two steps, so that no step waits long and none reads a slot that is half written."""

    def __init__(self, layout: AdapterLayout, count: int, device: Device) -> None:
        super().__init__(layout, count)
        self._device = device
        self._base = device.allocate(count * layout.slot_bytes, "adapters")
        self._staging = device.host_memory(min(_PIECE, layout.slot_bytes))

    def address(self, target: str) -> int:
        return self._base + self.layout.regions[target].offset

    def _store(self, slot: int, changes: Mapping[str, Factors], between_steps: BetweenSteps) -> None:
        content = np.zeros(self.layout.slot_bytes, np.uint8)
        write_slot(self.layout, content, changes)
        for start in range(0, len(content), len(self._staging)):
            piece = content[start : start + len(self._staging)]
            self._staging[: len(piece)] = piece
            address = self._base + slot * self.layout.slot_bytes + start
            between_steps(partial(self._copy, address, self._staging[: len(piece)]))

    def _copy(self, address: int, piece: Bytes) -> None:
        self._device.enter()
        self._device.upload(address, piece)
        self._device.synchronize()
