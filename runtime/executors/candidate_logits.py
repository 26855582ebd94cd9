"""The largest logits of each row, which a GPU selects, on their way to the host."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from belle_compile.runtime.executors.device import Device
from belle_compile.runtime.program import Program
from belle_compile.runtime.serving.candidates import Few, Row

COPIED = 512  # candidates of a row that are copied with every step


class CandidateLogits:
    """Fetches the candidates of a program (`Program.candidates`): the first `COPIED` of each row with every step, and all of a
    row that has more."""

    def __init__(self, program: Program, device: Device, arena: int) -> None:
        """`arena` is the arena's address on the device."""
        assert program.candidates is not None, "checked by the executor"
        self._layout, self._logits, self._rows = program.candidates, program.logits, program.max_rows
        self._device, self._arena = device, arena
        self._copied = min(COPIED, self._layout.capacity)
        self._counts = device.host_memory(4 * self._rows)
        self._places, self._values = (device.host_memory(4 * self._copied * self._rows) for _ in range(2))
        self._fetched = device.host_memory(4 * max(2 * self._layout.capacity * self._rows, self._logits.count))

    def download(self, rows: int) -> None:
        """Enqueue the copies of the counts and the first candidates of `rows` rows."""
        rows, layout = min(rows, self._rows), self._layout
        self._device.download(self._counts[: 4 * rows], self._arena + layout.counts)
        for copied, offset in ((self._places, layout.places), (self._values, layout.values)):
            self._device.download_rows(copied.reshape(self._rows, -1)[:rows], self._arena + offset, 4 * layout.capacity)

    def read(self, rows: int) -> list[Row]:
        """The logits of `rows` rows, once the copies of `download` have completed.

        A row is its candidates in ascending order of tokens, or whole where it has more candidates than the program keeps.
        """
        capacity = self._layout.capacity
        counts = self._counts.view(np.int32)[:rows].tolist()
        places = self._places.view(np.int32).reshape(self._rows, -1)
        values = self._values.view(np.float32).reshape(self._rows, -1)
        fetched = self._fetch([row for row in range(rows) if self._copied < counts[row] <= capacity], counts)
        widest = max((count for count in counts if count <= self._copied), default=0)
        tokens, logits = places[:rows, :widest].astype(np.int64), values[:rows, :widest].copy()
        result: list[Row] = []
        for row, count in enumerate(counts):
            if count <= self._copied:
                result.append(_ordered(tokens[row, :count], logits[row, :count]))
            elif count <= capacity:
                result.append(fetched[row])
            else:
                whole = self._fetched[: 4 * self._logits.count]
                self._device.download(whole, self._arena + self._logits.offset + 4 * row * self._logits.stride)
                self._device.synchronize()
                result.append(whole.view(np.float32).copy())
        return result

    def _fetch(self, rows: list[int], counts: list[int]) -> dict[int, Few]:
        """All candidates of rows that have more than were copied with the step, fetched together."""
        layout = self._layout
        buffers = self._fetched[: 8 * layout.capacity * self._rows].reshape(self._rows, 2, -1)
        for row in rows:
            for buffer, offset in zip(buffers[row], (layout.places, layout.values), strict=True):
                self._device.download(buffer[: 4 * counts[row]], self._arena + offset + 4 * row * layout.capacity)
        if rows:
            self._device.synchronize()
        fetched = {}
        for row in rows:
            places, values = (buffer[: 4 * counts[row]] for buffer in buffers[row])
            fetched[row] = _ordered(places.view(np.int32).astype(np.int64), values.view(np.float32))
        return fetched


def _ordered(places: NDArray[np.int64], values: NDArray[np.float32]) -> Few:
    """Candidates in ascending order of places; the device writes them in any order."""
    if len(places) == 1:
        return Few(places, values)
    order = places.argsort()
    return Few(places[order], values[order])
