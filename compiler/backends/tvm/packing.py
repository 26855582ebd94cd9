"""The layout of weights in an engine: panels of 16 outputs, padded so that kernels read whole registers."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from belle_compile.compiler.backends.program.kernel import round_up
from belle_compile.compiler.backends.tvm.kernels.panels import PANEL
from belle_compile.compiler.backends.tvm.kernels.quantized_linear import INPUT_ALIGNMENT

_INT6_AXES = 5  # of a packed weight of 6 bits; those of all others are fewer
_PANELS = 64  # number of panels packed at a time


def int8_panels_shape(outputs: int, inputs: int) -> tuple[int, int, int, int]:
    """[outputs/16][inputs/4][16][4]"""
    return (round_up(outputs, PANEL) // PANEL, round_up(inputs, INPUT_ALIGNMENT) // 4, PANEL, 4)


def pack_int8(weight: npt.NDArray[np.int8]) -> npt.NDArray[np.int8]:
    """Pack int8 [outputs, inputs] in panels, padded with zeros. Only 64 panels are packed at a time, so that little memory is
    needed beside the weight and the result."""
    shape = panels, groups, _, _ = int8_panels_shape(*weight.shape)
    packed = np.empty(shape, np.int8)
    for start in range(0, panels, _PANELS):
        rows = weight[start * PANEL : (start + _PANELS) * PANEL]
        count = min(_PANELS, panels - start)
        padded = np.zeros((count * PANEL, groups * 4), np.int8)
        padded[: len(rows), : weight.shape[1]] = rows
        packed[start : start + count] = padded.reshape(count, PANEL, groups, 4).transpose(0, 2, 1, 3)
    return packed


def int4_panels_shape(outputs: int, inputs: int) -> tuple[int, int, int, int]:
    """[outputs/16][inputs/8][16][4]"""
    panels, groups, _, _ = int8_panels_shape(outputs, inputs)
    return (panels, groups // 2, PANEL, 4)


def pack_int4(weight: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8]:
    """Pack [outputs, inputs] of -8..7 in the panels of int8, of which two steps of 4 inputs share their bytes: the first step
    is in the low halves, the second in the high ones. A half holds 0..15, the weight + 8; padding is a weight of zero."""
    steps = (pack_int8(weight) + 8).astype(np.uint8)
    packed: npt.NDArray[np.uint8] = steps[:, 0::2] | (steps[:, 1::2] << 4).astype(np.uint8)
    return packed


def int6_panels_shape(outputs: int, inputs: int) -> tuple[int, int, int, int, int]:
    """[outputs/16][inputs/16][3][16][4]"""
    panels, pairs, _, _ = int4_panels_shape(outputs, inputs)
    return (panels, pairs // 2, 3, PANEL, 4)


def pack_int6(weight: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8]:
    """Pack [outputs, inputs] of -32..31 in blocks of four steps of 4 inputs, three cache lines each. The low halves of the
    weights + 32 lie in the first two lines as in `pack_int4`; a byte of the third line has the upper two bits of the four
    steps, those of the first step lowest. Padding is a weight of zero."""
    steps = (pack_int8(weight) + 32).astype(np.uint8)
    low, high = steps & 15, steps >> 4
    packed = np.empty(int6_panels_shape(*weight.shape), np.uint8)
    packed[:, :, 0], packed[:, :, 1] = low[:, 0::4] | low[:, 1::4] << 4, low[:, 2::4] | low[:, 3::4] << 4
    packed[:, :, 2] = high[:, 0::4] | high[:, 1::4] << 2 | high[:, 2::4] << 4 | high[:, 3::4] << 6
    return packed


def group_scales_shape(outputs: int, groups: int) -> tuple[int, int, int]:
    """[outputs/16][groups][16] with an even number of panels, so that a tensor has a multiple of 64 bytes."""
    return (round_up(outputs, 2 * PANEL) // PANEL, groups, PANEL)


def pack_group_scales(scales: npt.NDArray[np.float16]) -> npt.NDArray[np.float16]:
    """Pack float16 [outputs, groups] in panels, padded with zeros."""
    panels, groups, _ = group_scales_shape(*scales.shape)
    padded = np.zeros((panels * PANEL, groups), np.float16)
    padded[: scales.shape[0]] = scales
    return np.ascontiguousarray(padded.reshape(panels, PANEL, groups).transpose(0, 2, 1))


def float_panels_shape(outputs: int, inputs: int) -> tuple[int, int, int]:
    """[outputs/16][inputs][16]"""
    return (round_up(outputs, PANEL) // PANEL, inputs, PANEL)


def pack_float(weight: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Pack float32 [outputs, inputs] in panels, padded with zeros."""
    panels, inputs, _ = float_panels_shape(*weight.shape)
    padded = np.zeros((panels * PANEL, inputs), np.float32)
    padded[: weight.shape[0]] = weight
    return np.ascontiguousarray(padded.reshape(panels, PANEL, inputs).transpose(0, 2, 1))


def correction(weight: npt.NDArray[np.int8]) -> npt.NDArray[np.int32]:
    """The int32 [outputs] that activations of int8 + 128 add to the sums: 128 times the sum of an output's weights."""
    sums: npt.NDArray[np.int64] = weight.sum(axis=1, dtype=np.int64)
    return (128 * sums).astype(np.int32)


def unpack(packed: npt.NDArray[Any], shape: tuple[int, ...], dtype: str) -> npt.NDArray[Any]:
    """Undo the packing of a tensor of `shape`: a vector, or a matrix of int8, int4 (as int8), int8 of 6 bits, float32 or
    float16 scales."""
    if len(shape) == 1:
        return packed[: shape[0]]
    panels = len(packed)
    if packed.ndim == _INT6_AXES:
        halves = np.stack([packed[:, :, :2] & 15, packed[:, :, :2] >> 4], axis=3).reshape(panels, -1, 4, PANEL, 4)
        upper = np.stack([packed[:, :, 2] >> shift & 3 for shift in (0, 2, 4, 6)], axis=2)
        packed = (halves | upper << 4).astype(np.int8) - np.int8(32)
    elif dtype == "int4":
        packed = np.stack([packed & 15, packed >> 4], axis=2).astype(np.int8) - np.int8(8)
    step = 4 if dtype in ("int8", "int4") else 1  # neighbouring inputs of an output
    rows: npt.NDArray[Any] = packed.reshape(panels, -1, PANEL, step).transpose(0, 2, 1, 3).reshape(panels * PANEL, -1)
    return rows[: shape[0], : shape[1]]
