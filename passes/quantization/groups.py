"""INT4 weights: a scale for every output and group of inputs, and the integers nearest to the weights."""

from __future__ import annotations

import onnx_ir as ir
import torch

from belle_compile.compiler.ir.meanings import GROUP

Tensor = torch.Tensor

LOWEST, HIGHEST = -8, 7
CANDIDATES = (1.0, 0.95, 0.9, 0.85, 0.8)  # scales tried, as parts of the outermost weight / -8
LARGEST = 65_504.0 * HIGHEST  # of a weight: scales are float16


def in_groups(linear: ir.Node) -> bool:
    """Whether a linear gets INT4 weights where a model does: all but the head, which makes the graph's output."""
    return not linear.outputs[0].is_graph_output()


def group_scales(weight: Tensor, importance: Tensor) -> Tensor:
    """float32 [N, G], values that float16 holds: of `CANDIDATES` for each group of a weight [N, K], that with the least squared
    rounding error, inputs weighed by `importance` [K]; the first of equal ones.

    Levels are not symmetric, so the sign of a scale says which end of the weights gets the eighth one.
    """
    outputs, inputs = weight.shape
    padding = -inputs % GROUP
    groups = torch.nn.functional.pad(weight, (0, padding)).view(outputs, -1, GROUP)
    weighs = torch.nn.functional.pad(importance, (0, padding)).view(-1, GROUP, 1)
    low, high = groups.amin(dim=2), groups.amax(dim=2)
    outermost = torch.where(high > -low, high, low) / LOWEST
    best, least = outermost, torch.full_like(outermost, torch.inf)
    for candidate in CANDIDATES:
        scales = (outermost * candidate).half().float()
        wrong = groups - nearest(groups, scales[:, :, None]) * scales[:, :, None]
        error = (wrong.square_().transpose(0, 1) @ weighs)[:, :, 0].T
        best, least = torch.where(error < least, scales, best), torch.minimum(error, least)
    return best


def nearest(weight: Tensor, scales: Tensor) -> Tensor:
    """weight / scales, rounded half to even, within the range of INT4; 0 where the scale is."""
    return torch.round(weight / torch.where(scales == 0, 1, scales)).clamp_(LOWEST, HIGHEST)


def every_input(scales: Tensor, inputs: int) -> Tensor:
    """[N, K]: the scale of each input's group."""
    return scales.repeat_interleave(GROUP, dim=1)[:, :inputs]
