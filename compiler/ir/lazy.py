"""Weights that are computed when they are read, and not before."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from compiler.errors import CompileError

Array = npt.NDArray[Any]


def lazy(name: str, compute: Callable[[], Array], shape: Sequence[int], dtype: ir.DataType | npt.DTypeLike) -> ir.LazyTensor:
    """A tensor whose values `compute` returns on every read; nothing is kept.

    A read raises CompileError where the result has another shape or dtype than announced.
    """
    element = dtype if isinstance(dtype, ir.DataType) else ir.DataType.from_numpy(np.dtype(dtype))
    expected = f"{element.numpy()}{list(shape)}"

    def read() -> ir.Tensor[Array]:
        array = compute()
        found = f"{array.dtype}{list(array.shape)}"
        if found != expected:
            raise CompileError("weights", f"tensor {name}", found=found, expected=expected)
        return ir.Tensor(np.ascontiguousarray(array), dtype=element, name=name)

    return ir.LazyTensor(read, dtype=element, shape=ir.Shape(shape), name=name)


class Shared:
    """Several tensors computed at once from one source, such as a weight's integers and their scales.

    Only the result of the source that was asked last is kept, whichever object that is: reading a model's weights
    in order computes each source once and holds one result at a time.
    """

    _lock = threading.RLock()
    _latest: Shared | None = None
    _result: tuple[Array, ...] = ()

    def __init__(self, compute: Callable[[], tuple[Array, ...]]) -> None:
        self._compute = compute

    def __getitem__(self, index: int) -> Array:
        with Shared._lock:
            if Shared._latest is not self:
                Shared._latest, Shared._result = None, ()  # free the old result before the new one is made
                result = self._compute()
                Shared._latest, Shared._result = self, result
            return Shared._result[index]
