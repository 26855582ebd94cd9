"""Logits that a device found to matter, as rows of the whole vocabulary."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from runtime.executors.device import Device
from runtime.program import Program

FEW = 512  # candidates of a row that are copied with every step


class FoundLogits:
    """The candidates of a program: copied with a step, put into rows that are -inf elsewhere."""

    def __init__(self, program: Program, device: Device, arena: int) -> None:
        assert program.candidates is not None, "the executor has seen to it"
        self._at, self._own, self._rows = program.candidates, program.logits, program.max_rows
        self._device, self._arena = device, arena
        self._few = min(FEW, self._at.capacity)
        self._counts = device.host_memory(4 * self._rows)
        self._places, self._values = (device.host_memory(4 * self._few * self._rows) for _ in range(2))
        self._many = device.host_memory(4 * max(2 * self._at.capacity * self._rows, self._own.count))
        self._logits = np.full((self._rows, self._own.count), -np.inf, np.float32)
        self._written: list[NDArray[np.int32] | None] = [np.empty(0, np.int32)] * self._rows  # None: the whole row

    def download(self, rows: int) -> None:
        """Ask for the counts and the first candidates of so many rows."""
        rows = min(rows, self._rows)
        self._device.download(self._counts[: 4 * rows], self._arena + self._at.counts)
        for few, offset in ((self._places, self._at.places), (self._values, self._at.values)):
            self._device.download_rows(few.reshape(self._rows, -1)[:rows], self._arena + offset, 4 * self._at.capacity)

    def read(self, rows: int) -> NDArray[np.float32]:
        """The logits [rows, vocabulary], after what `download` asked for has come."""
        counts = self._counts.view(np.int32)
        places = self._places.view(np.int32).reshape(self._rows, -1)
        values = self._values.view(np.float32).reshape(self._rows, -1)
        self._read_many([row for row in range(rows) if self._few < counts[row] <= self._at.capacity], counts)
        for row in range(rows):
            count = int(counts[row])
            if count <= self._few:
                self._write(row, places[row, :count], values[row, :count])
            elif count > self._at.capacity:
                whole = self._many[: 4 * self._own.count]
                self._device.download(whole, self._arena + self._own.offset + 4 * row * self._own.stride)
                self._device.synchronize()
                self._logits[row] = whole.view(np.float32)
                self._written[row] = None
        return self._logits[:rows]

    def _read_many(self, rows: list[int], counts: NDArray[np.int32]) -> None:
        """Rows of more candidates than came with the step, fetched together."""
        many = self._many[: 8 * self._at.capacity * self._rows].reshape(self._rows, 2, -1)
        for row in rows:
            for part, offset in zip(many[row], (self._at.places, self._at.values), strict=True):
                self._device.download(part[: 4 * counts[row]], self._arena + offset + 4 * row * self._at.capacity)
        if rows:
            self._device.synchronize()
        for row in rows:
            places, values = (part[: 4 * counts[row]] for part in many[row])
            self._write(row, places.view(np.int32), values.view(np.float32))

    def _write(self, row: int, places: NDArray[np.int32], values: NDArray[np.float32]) -> None:
        written = self._written[row]
        self._logits[row, slice(None) if written is None else written] = -np.inf
        self._logits[row, places] = values
        self._written[row] = places.copy()
