"""The NumPy meanings computed in float64 and rounded to float32 after each op, with little memory for weights.

The float32 results of NumPy depend on the host: its libraries choose other kernels, and so another order of sums, for other
processors. An INT8 model amplifies such differences, because a last bit may round an activation to the next integer. float64
results differ between hosts too, but so far below float32's last bit that they almost never round to different float32 numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from belle_compile.compiler.ir.ops import OpSpec
from belle_compile.compiler.ir.signature import Role

Array = npt.NDArray[Any]

_OF_OUTPUTS = frozenset({Role.WEIGHT, Role.SCALE, Role.BIAS, Role.GROUP_SCALE, Role.ZERO_POINT})  # of a linear
_WEIGHTS = 4 << 20  # weights that are float64 at a time


def precise(spec: OpSpec, arrays: Sequence[Array | None], keywords: Mapping[str, Any]) -> Any:
    """What the meaning of an op gives for float64 operands, as float32; for `evaluate`'s `apply`.

    The outputs of a linear are computed a few rows of its weight at a time.
    """
    weight = spec.index(Role.WEIGHT)
    if not spec.is_linear or weight is None:
        return _apply(spec, arrays, keywords)
    matrix = arrays[weight]
    assert matrix is not None, "a linear has a weight"
    rows = max(1, _WEIGHTS // matrix.shape[1])
    parts = []
    for start in range(0, len(matrix), rows):
        part = [
            array[start : start + rows] if array is not None and operand.role in _OF_OUTPUTS else array
            for operand, array in zip(spec.inputs, arrays, strict=True)
        ]
        parts.append(_apply(spec, part, keywords))
    return np.concatenate(parts, axis=-1)


def _apply(spec: OpSpec, arrays: Sequence[Array | None], keywords: Mapping[str, Any]) -> Any:
    # Rows of tables are selected, not summed: a table need not be copied.
    operands = [
        array if array is None or array.dtype != np.float32 or operand.role is Role.TABLE else array.astype(np.float64)
        for operand, array in zip(spec.inputs, arrays, strict=True)
    ]
    produced = spec.meaning(*operands, **keywords)
    return tuple(map(_rounded, produced)) if isinstance(produced, tuple) else _rounded(produced)


def _rounded(array: Array) -> Array:
    return array.astype(np.float32) if array.dtype == np.float64 else array
