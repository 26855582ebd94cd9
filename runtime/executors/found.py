"""Logits that a device found to matter."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from belle_compile.runtime.executors.device import Device
from belle_compile.runtime.program import Program
from belle_compile.runtime.serving.candidates import Few, Row

FEW = 512  # candidates of a row that are copied with every step


class FoundLogits:
    """The candidates of a program: the first of each row are copied with a step, more of them when there are."""

    def __init__(self, program: Program, device: Device, arena: int) -> None:
        assert program.candidates is not None, "the executor has seen to it"
        self._at, self._own, self._rows = program.candidates, program.logits, program.max_rows
        self._device, self._arena = device, arena
        self._few = min(FEW, self._at.capacity)
        self._counts = device.host_memory(4 * self._rows)
        self._places, self._values = (device.host_memory(4 * self._few * self._rows) for _ in range(2))
        self._many = device.host_memory(4 * max(2 * self._at.capacity * self._rows, self._own.count))

    def download(self, rows: int) -> None:
        """Ask for the counts and the first candidates of so many rows."""
        rows = min(rows, self._rows)
        self._device.download(self._counts[: 4 * rows], self._arena + self._at.counts)
        for few, offset in ((self._places, self._at.places), (self._values, self._at.values)):
            self._device.download_rows(few.reshape(self._rows, -1)[:rows], self._arena + offset, 4 * self._at.capacity)

    def read(self, rows: int) -> list[Row]:
        """The logits of so many rows, after what `download` asked for has come."""
        counts = self._counts.view(np.int32)[:rows].tolist()
        places = self._places.view(np.int32).reshape(self._rows, -1)
        values = self._values.view(np.float32).reshape(self._rows, -1)
        many = self._read_many([row for row in range(rows) if self._few < counts[row] <= self._at.capacity], counts)
        widest = max((count for count in counts if count <= self._few), default=0)
        tokens, logits = places[:rows, :widest].astype(np.int64), values[:rows, :widest].copy()
        found: list[Row] = []
        for row, count in enumerate(counts):
            if count <= self._few:
                found.append(_ordered(tokens[row, :count], logits[row, :count]))
            elif count <= self._at.capacity:
                found.append(many[row])
            else:
                whole = self._many[: 4 * self._own.count]
                self._device.download(whole, self._arena + self._own.offset + 4 * row * self._own.stride)
                self._device.synchronize()
                found.append(whole.view(np.float32).copy())
        return found

    def _read_many(self, rows: list[int], counts: list[int]) -> dict[int, Few]:
        """Rows of more candidates than came with the step, fetched together."""
        many = self._many[: 8 * self._at.capacity * self._rows].reshape(self._rows, 2, -1)
        for row in rows:
            for part, offset in zip(many[row], (self._at.places, self._at.values), strict=True):
                self._device.download(part[: 4 * counts[row]], self._arena + offset + 4 * row * self._at.capacity)
        if rows:
            self._device.synchronize()
        found = {}
        for row in rows:
            places, values = (part[: 4 * counts[row]] for part in many[row])
            found[row] = _ordered(places.view(np.int32).astype(np.int64), values.view(np.float32))
        return found


def _ordered(places: NDArray[np.int64], values: NDArray[np.float32]) -> Few:
    """In ascending order of places; a device finds them in any order."""
    if len(places) == 1:
        return Few(places, values)
    order = places.argsort()
    return Few(places[order], values[order])
