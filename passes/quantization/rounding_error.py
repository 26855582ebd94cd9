"""How far integers that a build chose again lie from the weights that its checkpoint holds as integers."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[Any]

ROUNDING_ERROR = "rounding error"  # key in the meta of a tensor of integers; the value is a RoundingError


class RoundingError:
    """The error of the integers that take the place of a weight `before`, relative to the weight.

    It is measured while the integers are computed, so that nothing is read for it: whoever rounds the weight calls `add` for
    its rows in order. Where the integers were chosen earlier, the weight is read again, and `rounded()`, which returns the
    product of integers and scales, float32 [N, K].
    """

    def __init__(self, before: ir.TensorProtocol) -> None:
        self._before = before
        self.rounded: Callable[[], Array] | None = None
        self._sums: tuple[float, float] | None = None  # of the squares of the differences, and of the weights

    def add(self, first: int, weight: Array, rounded: Array) -> None:
        """Add rows of the weight from the row `first` on, float32 [n, K], and what their integers stand for."""
        of_differences, of_weights = self._sums if first and self._sums else (0.0, 0.0)
        self._sums = of_differences + _squares(rounded - weight), of_weights + _squares(weight)

    @property
    def value(self) -> float:
        """The root of the sum of squared differences over that of the squared weights; 0 for a weight of zeros."""
        if self._sums is None:
            assert self.rounded is not None, "a measurement belongs to a tensor of integers"
            rounded = self.rounded()  # where that rounds the weight, it calls `add`
            if self._sums is None:
                self.add(0, self._before.numpy(), rounded)
        of_differences, of_weights = self._sums or (0.0, 0.0)
        return sqrt(of_differences / of_weights) if of_weights else 0.0


def _squares(values: Array) -> float:
    return float(np.einsum("nk,nk->n", values, values, dtype=np.float64).sum())
