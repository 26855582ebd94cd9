"""Weights that a checkpoint stores as integers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.intp]

BLOCK_ELEMENTS = 1 << 22  # elements dequantized at a time, so that temporaries stay small beside the result


@dataclass(frozen=True)
class Grid:
    """What integers of rows stand for: `scales`, `zero_points` and `offsets` [rows, groups].

    Scales and offsets have the checkpoint's float type, zero points are int8.
    """

    scales: npt.NDArray[Any]
    zero_points: npt.NDArray[np.int8] | None = None
    offsets: npt.NDArray[Any] | None = None

    def taken(self, rows: Indices) -> Grid:
        """The grid of some rows, in that order."""
        parts = (None if part is None else part[rows] for part in (self.scales, self.zero_points, self.offsets))
        return Grid(*parts)  # type: ignore[arg-type]


@dataclass(frozen=True)
class QuantizedRows:
    """Rows of a quantized weight: `integers` int8 [rows, inputs], and the `scales`, `zero_points` and `offsets` of their
    groups.

    Groups are equally many neighbouring inputs, unless `group_of` [inputs] says which group each input belongs to. The reader
    of a format with unsigned integers of b bits subtracts 2^(b-1) from integers and zero points.
    """

    integers: npt.NDArray[np.int8]
    scales: npt.NDArray[Any]
    zero_points: npt.NDArray[np.int8] | None = None
    offsets: npt.NDArray[Any] | None = None
    group_of: Indices | None = None

    @property
    def grid(self) -> Grid:
        """The scales, zero points and offsets."""
        return Grid(self.scales, self.zero_points, self.offsets)

    def dequantized(self) -> Floats:
        """float32 [rows, inputs]: (integers - zero_points) * scales + offsets."""
        rows, inputs = self.integers.shape
        groups = self.scales.shape[1]
        shape = (rows, groups, inputs // groups) if self.group_of is None else (rows, inputs)
        values = self.integers.astype(np.float32).reshape(shape)
        if self.zero_points is not None:
            values -= self._of_inputs(self.zero_points)
        values *= self._of_inputs(self.scales)
        if self.offsets is not None:
            values += self._of_inputs(self.offsets)
        return values.reshape(rows, inputs)

    def _of_inputs(self, of_groups: npt.NDArray[Any]) -> Floats:
        """Numbers of groups in a shape that is broadcast to the inputs."""
        numbers = of_groups.astype(np.float32)
        return numbers[:, :, None] if self.group_of is None else numbers[:, self.group_of]


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight [outputs, inputs] as a checkpoint stores it: integers of `bits` bits, with a scale for every `group` of them.

    Groups run along `axis`, the inputs, and `group` divides the number of inputs. It is None where groups are no neighbours:
    `QuantizedRows.group_of` then says which group an input belongs to. `load(start, stop)` reads outputs start..stop at every
    call; nothing is kept in memory. `load_grid()` reads the grid of all outputs alone, where a format stores it apart from the
    integers. `by_inputs` says that a file has all outputs of an input side by side, so that reading few outputs takes as long
    as all.
    """

    axis: ClassVar[int] = 1

    shape: tuple[int, int]
    bits: int
    group: int | None
    load: Callable[[int, int], QuantizedRows]
    load_grid: Callable[[], Grid] | None = None
    by_inputs: bool = False

    def read(self) -> QuantizedRows:
        """The whole weight's integers, scales, zero points and offsets."""
        return self.load(0, self.shape[0])

    def grid(self) -> Grid:
        """The whole weight's scales, zero points and offsets."""
        return self.read().grid if self.load_grid is None else self.load_grid()

    def numpy(self) -> Floats:
        """The whole weight in float32."""
        return self.rows(0, self.shape[0])

    def rows(self, start: int, stop: int) -> Floats:
        """Outputs start..stop in float32 [stop - start, inputs]."""
        if self.by_inputs:
            return self.load(start, stop).dequantized()
        values = np.empty((stop - start, self.shape[1]), np.float32)
        step = max(1, BLOCK_ELEMENTS // self.shape[1])
        for first in range(start, stop, step):
            last = min(first + step, stop)
            values[first - start : last - start] = self.load(first, last).dequantized()
        return values

    def reordered(self, order: Indices) -> QuantizedTensor:
        """The same weight with its outputs in another order: output i is the one that was `order[i]`."""

        def load(start: int, stop: int) -> QuantizedRows:
            stored = order[start:stop]
            first, last = (int(stored.min()), int(stored.max()) + 1) if start < stop else (0, 0)
            rows, places = self.load(first, last), stored - first
            grid = rows.grid.taken(places)
            return QuantizedRows(rows.integers[places], grid.scales, grid.zero_points, grid.offsets, rows.group_of)

        return replace(self, load=load, load_grid=lambda: self.grid().taken(order))
