"""Weights with one scale for each output and group of inputs, and the integers nearest to the weights: INT4, or INT8."""

from __future__ import annotations

import onnx_ir as ir
import torch

Tensor = torch.Tensor

LOWEST, HIGHEST = -8, 7
LIMIT = 127  # of INT8, which is symmetric
CANDIDATES = (1.0, 0.95, 0.9, 0.85, 0.8)  # scales tried, as fractions of the outermost weight / -8
# As fractions of the largest magnitude / 127. Clipping gains little where there are so many integers; what helps is the choice
# of a scale whose multiples happen to lie near the weights.
CANDIDATES_INT8 = tuple(round(1.02 - 0.005 * i, 3) for i in range(13))  # 1.02 to 0.96
LARGEST = 65_504.0 * HIGHEST  # the largest weight that a float16 scale is enough for


_WEIGHTS, _INT8 = "weights", "int8"  # the metadata of a linear that does not get INT4 weights


def in_groups(linear: ir.Node) -> bool:
    """Whether a linear gets INT4 weights where its model has some: all do but the head, which computes the graph's output, and
    those that `leave_int8` marked."""
    return not linear.outputs[0].is_graph_output() and linear.metadata_props.get(_WEIGHTS) != _INT8


def leave_int8(linear: ir.Node) -> None:
    """Mark a linear: where its model has INT4 weights, it gets INT8 ones with a scale for each output."""
    linear.metadata_props[_WEIGHTS] = _INT8


def group_scales(weight: Tensor, importance: Tensor, group: int, bits: int = 4) -> Tensor:
    """float32 [N, G]: a scale for every `group` inputs of each output of a weight [N, K].

    The scale is the outermost weight / -8 times the one of `CANDIDATES` with the least squared rounding error, where inputs are
    weighted by `importance` [K]; of equal errors the first counts. Scales are rounded to float16. As there are eight negative
    levels and seven positive ones, the sign of a scale decides which end of the weights gets the eighth. Scales of INT8 are
    positive, and those tried are fractions of the largest magnitude / 127.
    """
    outputs, inputs = weight.shape
    padding = -inputs % group
    groups = torch.nn.functional.pad(weight, (0, padding)).view(outputs, -1, group)
    factors = torch.nn.functional.pad(importance, (0, padding)).view(-1, group, 1)
    low, high = groups.amin(dim=2), groups.amax(dim=2)
    outermost = torch.maximum(high, -low) / LIMIT if bits == 8 else torch.where(high > -low, high, low) / LOWEST
    best, least = outermost, torch.full_like(outermost, torch.inf)
    for candidate in CANDIDATES_INT8 if bits == 8 else CANDIDATES:
        scales = (outermost * candidate).half().float()
        difference = groups - nearest(groups, scales[:, :, None], bits) * scales[:, :, None]
        error = (difference.square_().transpose(0, 1) @ factors)[:, :, 0].T
        best, least = torch.where(error < least, scales, best), torch.minimum(error, least)
    return best


def nearest(weight: Tensor, scales: Tensor, bits: int = 4) -> Tensor:
    """weight / scales, rounded half to even and clipped to the range of the integers; 0 where the scale is 0."""
    lowest, highest = (-LIMIT, LIMIT) if bits == 8 else (LOWEST, HIGHEST)
    return torch.round(weight / torch.where(scales == 0, 1, scales)).clamp_(lowest, highest)


def every_input(scales: Tensor, inputs: int, group: int) -> Tensor:
    """[N, K]: the scale of each input's group."""
    return scales.repeat_interleave(group, dim=1)[:, :inputs]
