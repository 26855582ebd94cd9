"""The bytes of a packed tensor, as files of weights hold them."""

from __future__ import annotations

import numpy as np

from belle_compile.compiler.backends.base import Array, PackedTensor
from belle_compile.compiler.errors import CompileError

_CHECKED = 1 << 20  # values that are checked at once


def packed_bytes(tensor: PackedTensor) -> memoryview:
    """Pack a tensor; raises CompileError where it holds NaN or infinity, which every answer of the engine would have."""
    array = np.ascontiguousarray(tensor.pack())
    if (array.dtype.name, array.shape) != (tensor.dtype, tuple(tensor.shape)):
        raise AssertionError(
            f"{tensor.name} was announced as {tensor.dtype}{list(tensor.shape)} and packed as "
            f"{array.dtype.name}{list(array.shape)}"
        )
    _require_finite(tensor.name, array)
    return array.reshape(-1).view(np.uint8).data


def _require_finite(name: str, array: Array) -> None:
    values = array.reshape(-1)
    if array.dtype.kind in "iub":
        return
    for start in range(0, len(values), _CHECKED):
        finite = np.isfinite(values[start : start + _CHECKED])
        if not finite.all():
            row = (start + int(np.argmin(finite))) // (array.shape[-1] if array.ndim > 1 else len(values))
            place = f" in row {row}" if array.ndim > 1 else ""
            raise CompileError("write", f"tensor {name}", found=f"NaN or infinity{place}", expected="finite weights")
