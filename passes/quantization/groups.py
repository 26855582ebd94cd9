"""Weights with one scale for each output and group of inputs, and the integers nearest to the weights, of 4, 6 or 8 bits."""

from __future__ import annotations

import onnx_ir as ir
import torch

from belle_compile.passes.quantization.scheme import WeightScheme

Tensor = torch.Tensor

HIGHEST = 7  # of INT4
LIMIT = 127  # of INT8, which is symmetric
CANDIDATES = (1.0, 0.95, 0.9, 0.85, 0.8)  # scales tried, as fractions of the outermost weight / the lowest integer
# As fractions of the largest magnitude / 127. Clipping gains little where there are so many integers; what helps is the choice
# of a scale whose multiples happen to lie near the weights.
CANDIDATES_INT8 = tuple(round(1.02 - 0.005 * i, 3) for i in range(13))  # 1.02 to 0.96
LARGEST = 65_504.0 * HIGHEST  # the largest weight that a float16 scale is enough for


_BITS = "weight bits"  # the metadata of a linear whose weights get other bits than those of its model


def give_bits(linear: ir.Node, bits: int) -> None:
    """Mark a linear: where its model has INT4 weights, those of the linear get 6 bits, or 8 with a scale for each output."""
    linear.metadata_props[_BITS] = str(bits)


def in_groups(linear: ir.Node) -> bool:
    """Whether a linear gets weights in groups where its model has some: all do but the head, which computes the graph's output,
    and those that were given 8 bits."""
    return not linear.outputs[0].is_graph_output() and linear.metadata_props.get(_BITS) != "8"


def group_bits(linear: ir.Node, weights: WeightScheme) -> int:
    """The bits of a linear's weights in groups, in a model of that scheme."""
    return int(linear.metadata_props.get(_BITS, weights.bits))


def group_scales(weight: Tensor, importance: Tensor, group: int, bits: int = 4) -> Tensor:
    """float32 [N, G]: a scale for every `group` inputs of each output of a weight [N, K].

    The scale is the outermost weight / -8, the lowest integer of 4 bits, times the one of `CANDIDATES` with the least squared
    rounding error, where inputs are weighted by `importance` [K]; of equal errors the first counts. Scales are rounded to
    float16. As there are eight negative levels and seven positive ones, the sign of a scale decides which end of the weights
    gets the eighth. 6 bits likewise have -32. Scales of INT8 are positive, and those tried are fractions of the largest
    magnitude / 127.
    """
    outputs, inputs = weight.shape
    padding = -inputs % group
    groups = torch.nn.functional.pad(weight, (0, padding)).view(outputs, -1, group)
    factors = torch.nn.functional.pad(importance, (0, padding)).view(-1, group, 1)
    low, high = groups.amin(dim=2), groups.amax(dim=2)
    outermost = torch.maximum(high, -low) / LIMIT if bits == 8 else torch.where(high > -low, high, low) / limits(bits)[0]
    best, least = outermost, torch.full_like(outermost, torch.inf)
    for candidate in CANDIDATES_INT8 if bits == 8 else CANDIDATES:
        scales = (outermost * candidate).half().float()
        difference = groups - nearest(groups, scales[:, :, None], bits) * scales[:, :, None]
        error = (difference.square_().transpose(0, 1) @ factors)[:, :, 0].T
        best, least = torch.where(error < least, scales, best), torch.minimum(error, least)
    return best


def nearest(weight: Tensor, scales: Tensor, bits: int = 4) -> Tensor:
    """weight / scales, rounded half to even and clipped to the range of the integers; 0 where the scale is 0."""
    return torch.round(weight / torch.where(scales == 0, 1, scales)).clamp_(*limits(bits))


def limits(bits: int) -> tuple[int, int]:
    """The lowest and the highest integer."""
    return (-LIMIT, LIMIT) if bits == 8 else (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)


def every_input(scales: Tensor, inputs: int, group: int) -> Tensor:
    """[N, K]: the scale of each input's group."""
    return scales.repeat_interleave(group, dim=1)[:, :inputs]
