"""INT8 weights with one scale per output channel, computed when they are read."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from compiler.errors import CompileError
from compiler.ir.build import make_initializer
from compiler.ir.lazy import Shared, lazy

INTEGERS = "integers"  # in the meta of a float32 weight that is a product: Shared integers [N, K] and scales [N]
_ROWS = 1024  # rows quantized at a time, so that temporaries stay small beside the weight


def quantized_weight(weight: ir.Value, graph: ir.Graph) -> tuple[ir.Value, ir.Value]:
    """Initializers <name>.int8 [N, K] and <name>.scale [N] of a float32 weight [N, K], rounded to nearest where no pass has
    chosen integers before.

    The second call for the same weight returns the same two: a tied head and embedding share one table.
    """
    name, source = str(weight.name), weight.const_value
    assert source is not None
    shape = source.shape.numpy()
    if f"{name}.int8" not in graph.initializers:
        both = weight.meta.get(INTEGERS) or Shared(lambda: quantize_rows(source.numpy(), name))
        integers = lazy(f"{name}.int8", lambda: both[0], shape, ir.DataType.INT8)
        scales = lazy(f"{name}.scale", lambda: both[1], shape[:1], ir.DataType.FLOAT)
        for tensor in (integers, scales):
            graph.register_initializer(make_initializer(tensor))
    return graph.initializers[f"{name}.int8"], graph.initializers[f"{name}.scale"]


def quantize_rows(weight: npt.NDArray[np.float32], name: str) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """int8 weight / scale, rounded half to even and within +-127, and scale = absmax / 127 of each row; zero rows give zeros.

    Raises CompileError where the weight holds NaN or infinity.
    """
    integers = np.empty(weight.shape, np.int8)
    scales = np.empty(len(weight), np.float32)
    for start in range(0, len(weight), _ROWS):
        rows = slice(start, start + _ROWS)
        block = weight[rows]
        absmax = np.maximum(block.max(axis=1), -block.min(axis=1))
        if not np.isfinite(absmax).all():
            bad = start + int(np.argmin(np.isfinite(absmax)))
            raise CompileError("quantize", f"tensor {name}", found=f"NaN or infinity in row {bad}", expected="finite weights")
        scales[rows] = absmax / np.float32(127)
        divisors = np.where(scales[rows] > 0, scales[rows], np.float32(1))[:, None]
        integers[rows] = np.clip(np.rint(block / divisors), -127, 127)
    return integers, scales
