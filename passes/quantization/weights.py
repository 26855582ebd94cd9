"""Integer weights and their scales, computed when they are read: INT8 with one scale per output, INT4 with one per group."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.ir.build import make_initializer
from belle_compile.compiler.ir.lazy import Shared, has_integers, has_rows, lazy, read_rows
from belle_compile.passes.quantization import groups
from belle_compile.passes.quantization.rounding_error import ROUNDING_ERROR, RoundingError

# Keys in the meta of a float32 weight that a pass has rounded. The value is a Shared of integers [N, K] and scales: float32
# [N], or float16 [N, G] for groups.
INTEGERS, GROUPED = "integers", "grouped integers"
BEFORE = "before rounding"  # key beside these: the tensor whose values the integers take the place of, if they changed them
_ROWS = 1024  # rows quantized at a time, so that temporaries stay small beside the weight


def quantized_weight(weight: ir.Value, graph: ir.Graph) -> tuple[ir.Value, ir.Value]:
    """Initializers <name>.int8 [N, K] and <name>.scale [N] of a float32 weight [N, K].

    Integers are the nearest ones unless a pass has chosen some before. A second call for the same weight returns the same two
    initializers: a tied head and embedding share one table.
    """
    name, source = str(weight.name), weight.const_value
    assert source is not None
    shape = source.shape.numpy()
    if f"{name}.int8" not in graph.initializers:
        error = _rounding_error(weight)
        both = weight.meta.get(INTEGERS) or Shared(lambda: quantize_tensor(source, name, error))
        integers = lazy(
            f"{name}.int8", lambda: both[0], shape, ir.DataType.INT8, step="int8", sources=[source], basis_of=source
        )
        scales = lazy(f"{name}.scale", lambda: both[1], shape[:1], ir.DataType.FLOAT, step="scale", sources=[source])
        _measured(integers, error, both, None)
        for tensor in (integers, scales):
            graph.register_initializer(make_initializer(tensor))
    return graph.initializers[f"{name}.int8"], graph.initializers[f"{name}.scale"]


def grouped_weight(weight: ir.Value, group: int, graph: ir.Graph, bits: int = 4) -> tuple[ir.Value, ir.Value]:
    """Initializers <name>.int4 [N, K] and <name>.scales [N, G] of a float32 weight [N, K], with scales of `group` inputs; of 6
    `bits` <name>.int6, whose type is int8.

    Integers are the nearest ones unless a pass has chosen some before. A second call for the same weight returns the same two
    initializers.
    """
    name, source = str(weight.name), weight.const_value
    assert source is not None
    outputs, inputs = source.shape.numpy()
    if f"{name}.int{bits}" not in graph.initializers:
        error = _rounding_error(weight)
        both = weight.meta.get(GROUPED) or Shared(lambda: quantize_groups(source.numpy(), name, group, error, bits))
        dtype = ir.DataType.INT4 if bits == 4 else ir.DataType.INT8
        shape, groups_shape = (outputs, inputs), (outputs, -(-inputs // group))
        integers = lazy(
            f"{name}.int{bits}", lambda: both[0].astype(dtype.numpy()), shape, dtype,
            step=f"int{bits}", sources=[source], basis_of=source,
        )  # fmt: skip
        scales = lazy(f"{name}.scales", lambda: both[1], groups_shape, ir.DataType.FLOAT16, step="scales", sources=[source])
        _measured(integers, error, both, group)
        for tensor in (integers, scales):
            graph.register_initializer(make_initializer(tensor))
    return graph.initializers[f"{name}.int{bits}"], graph.initializers[f"{name}.scales"]


def _rounding_error(weight: ir.Value) -> RoundingError | None:
    """A new measurement for a weight that its checkpoint holds as integers; None where there are none, or they are kept."""
    chosen = bool({INTEGERS, GROUPED} & weight.meta.keys())
    before = weight.meta.get(BEFORE) if chosen else weight.const_value
    return RoundingError(before) if before is not None and has_integers(before) else None


def _measured(integers: ir.TensorProtocol, error: RoundingError | None, both: Shared, group: int | None) -> None:
    """Let a tensor tell the error of the integers `both[0]` with scales `both[1]`."""
    if error is not None:
        error.rounded = lambda: product(torch.tensor(both[0]), torch.tensor(both[1]), group).numpy()
        integers.meta[ROUNDING_ERROR] = error


def rounded_weight(weight: ir.Value) -> tuple[ir.TensorProtocol, ir.TensorProtocol] | None:
    """The int8 integers [N, K] that a pass has chosen for a float32 weight, and their scales: float32 [N], or float16 [N, G] of
    groups. None for a weight that no pass has rounded."""
    source, grouped = weight.const_value, GROUPED in weight.meta
    both = weight.meta.get(GROUPED) or weight.meta.get(INTEGERS)
    if both is None or source is None:
        return None
    shape = tuple(source.shape.numpy())
    scales_shape, dtype = (tuple(both[1].shape), ir.DataType.FLOAT16) if grouped else (shape[:1], ir.DataType.FLOAT)
    integers = lazy(f"{weight.name}.int8", lambda: both[0], shape, ir.DataType.INT8, step="int8", sources=[source])
    scales = lazy(f"{weight.name}.scales", lambda: both[1], scales_shape, dtype, step="scales", sources=[source])
    group = -(-shape[1] // scales_shape[1]) if grouped else None
    _measured(source, _rounding_error(weight), both, group)
    return integers, scales


def nearest_blocks(
    rows: npt.NDArray[np.float32], weight: ir.TensorProtocol, start: int, block: int
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """int8 integers [n, K] nearest to the rows from `start` on of a float matrix, in any order of its rows, and float16 scales
    [n, G] of `block` inputs with the least squared error.

    If a checkpoint holds the matrix as integers, the tensor `weight` tells the error afterwards. Raises CompileError where the
    rows hold NaN, infinity or a value too large for such a scale.
    """
    if has_integers(weight):
        weight.meta.setdefault(ROUNDING_ERROR, RoundingError(weight))
    integers, scales = quantize_groups(rows, str(weight.name), block, bits=8)
    if error := weight.meta.get(ROUNDING_ERROR):
        error.add(start, rows, product(torch.from_numpy(integers), torch.from_numpy(scales), block).numpy())
    return integers, scales


def quantize_tensor(
    weight: ir.TensorProtocol, name: str, error: RoundingError | None = None
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Quantize a tensor as `quantize_rows` does; where rows can be read alone, it is not in memory as a whole in float32."""
    if not has_rows(weight):
        return quantize_rows(weight.numpy(), name, error=error)
    count, inputs = weight.shape.numpy()
    integers, scales = np.empty((count, inputs), np.int8), np.empty(count, np.float32)
    for start in range(0, count, _ROWS):
        rows = slice(start, min(start + _ROWS, count))
        block = read_rows(weight, rows.start, rows.stop)
        integers[rows], scales[rows] = quantize_rows(block, name, start, error)
    return integers, scales


def quantize_rows(
    weight: npt.NDArray[np.float32], name: str, first: int = 0, error: RoundingError | None = None
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return int8 weight / scale, rounded half to even and within +-127, and the scale of each row, float32 absmax / 127.

    Zero rows give zeros. `first` is the number of the first row in the whole weight `name`; `error` measures what rounding
    changes. Raises CompileError where a row holds NaN or infinity.
    """
    integers = np.empty(weight.shape, np.int8)
    scales = np.empty(len(weight), np.float32)
    for start in range(0, len(weight), _ROWS):
        rows = slice(start, start + _ROWS)
        block = weight[rows]
        absmax = np.maximum(block.max(axis=1), -block.min(axis=1))
        if not np.isfinite(absmax).all():
            bad = first + start + int(np.argmin(np.isfinite(absmax)))
            raise CompileError("quantize", f"tensor {name}", found=f"NaN or infinity in row {bad}", expected="finite weights")
        scales[rows] = absmax / np.float32(127)
        divisors = np.where(scales[rows] > 0, scales[rows], np.float32(1))[:, None]
        integers[rows] = np.clip(np.rint(block / divisors), -127, 127)
        if error is not None:
            error.add(first + start, block, integers[rows] * scales[rows, None])
    return integers, scales


def quantize_groups(
    weight: npt.NDArray[np.float32], name: str, group: int, error: RoundingError | None = None, bits: int = 4
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return int8 integers of `bits` bits, the nearest to weight / scale, and float16 scales [N, G] of `group` inputs each.

    Scales are chosen for the least squared error; `error` measures it. Raises CompileError where the weight holds NaN,
    infinity, or a value that is too large for a float16 scale.
    """
    outputs, inputs = weight.shape
    integers = np.empty(weight.shape, np.int8)
    scales = np.empty((outputs, -(-inputs // group)), np.float16)
    equal = torch.ones(inputs)
    for start in range(0, outputs, _ROWS):
        rows = slice(start, start + _ROWS)
        block = torch.from_numpy(np.array(weight[rows]))
        check_groups(block, f"tensor {name}")
        steps = groups.group_scales(block, equal, group, bits)
        integers[rows] = groups.nearest(block, groups.every_input(steps, inputs, group), bits).numpy()
        scales[rows] = steps.numpy()
        if error is not None:
            rounded = product(torch.from_numpy(integers[rows]), torch.from_numpy(scales[rows]), group)
            error.add(start, block.numpy(), rounded.numpy())
    return integers, scales


def check_groups(weight: torch.Tensor, what: str) -> None:
    """Raise CompileError where the weight cannot be INT4 integers times float16 scales."""
    largest = float(weight.abs().max())  # NaN where there is one
    if not largest <= groups.LARGEST:
        expected = f"finite weights within +-{groups.LARGEST:,.0f}"
        raise CompileError("quantize", what, found=f"a weight of magnitude {largest:,.0f}", expected=expected)


def product(integers: torch.Tensor, scales: torch.Tensor, group: int | None = None) -> torch.Tensor:
    """float32 [N, K]: the weight that integers [N, K] and scales stand for, [N] or, of `group` inputs each, [N, G]."""
    steps = scales[:, None] if group is None else groups.every_input(scales.float(), integers.shape[1], group)
    return integers * steps
