"""Weights that a checkpoint stores as integers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

BLOCK_ELEMENTS = 1 << 22  # elements dequantized at a time, so that temporaries stay small beside the result


@dataclass(frozen=True)
class QuantizedRows:
    """Rows of a quantized weight: `integers` int8 [rows, inputs], and `scales`, `zero_points` and `offsets` [rows, groups].

    Scales and offsets have the checkpoint's float type, zero points are int8. The reader of a format with unsigned bytes
    subtracts 128 from integers and zero points.
    """

    integers: npt.NDArray[np.int8]
    scales: npt.NDArray[Any]
    zero_points: npt.NDArray[np.int8] | None = None
    offsets: npt.NDArray[Any] | None = None

    def dequantized(self) -> Floats:
        """float32 [rows, inputs]: (integers - zero_points) * scales + offsets."""
        rows, inputs = self.integers.shape
        groups = self.scales.shape[1]
        values = self.integers.astype(np.float32).reshape(rows, groups, inputs // groups)
        if self.zero_points is not None:
            values -= self.zero_points.astype(np.float32)[:, :, None]
        values *= self.scales.astype(np.float32)[:, :, None]
        if self.offsets is not None:
            values += self.offsets.astype(np.float32)[:, :, None]
        return values.reshape(rows, inputs)


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight [outputs, inputs] as a checkpoint stores it: integers of `bits` bits, with a scale for every `group` of them.

    Groups run along `axis`, the inputs, and `group` divides the number of inputs. `load(start, stop)` reads outputs start..stop
    at every call; nothing is kept in memory.
    """

    axis: ClassVar[int] = 1

    shape: tuple[int, int]
    bits: int
    group: int
    load: Callable[[int, int], QuantizedRows]

    def read(self) -> QuantizedRows:
        """The whole weight's integers, scales, zero points and offsets."""
        return self.load(0, self.shape[0])

    def numpy(self) -> Floats:
        """The whole weight in float32."""
        return self.rows(0, self.shape[0])

    def rows(self, start: int, stop: int) -> Floats:
        """Outputs start..stop in float32 [stop - start, inputs]."""
        values = np.empty((stop - start, self.shape[1]), np.float32)
        step = max(1, BLOCK_ELEMENTS // self.shape[1])
        for first in range(start, stop, step):
            last = min(first + step, stop)
            values[first - start : last - start] = self.load(first, last).dequantized()
        return values
