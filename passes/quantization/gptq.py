"""Rounding that makes up for each weight's error with the weights after it (Frantar et al., GPTQ, arXiv:2210.17323)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from belle_compile.compiler.ir.meanings import GROUP
from belle_compile.passes.quantization import groups

Tensor = torch.Tensor

BLOCK = 128  # inputs whose errors are carried to the rest at once
ROWS = 16_384  # outputs rounded at a time: a head of 250,880 rows is not held twice
CLIPS = (1.0, 0.98, 0.96, 0.94, 0.92, 0.90)  # scales tried, as parts of absmax / 127


def scales_of(weight: Tensor, importance: Tensor, clips: tuple[float, ...] = CLIPS) -> Tensor:
    """float32 [N]: of `clips` times absmax / 127 of each row, that with the least squared rounding error, inputs weighed by
    `importance` [K]; the first of equal ones."""
    widest = weight.abs().amax(dim=1) / 127
    best, least = widest, torch.full_like(widest, torch.inf)
    for clip in clips:
        scales = widest * clip
        error = (weight - _integers(weight, scales[:, None]) * scales[:, None]).square_() @ importance
        best, least = torch.where(error < least, scales, best), torch.minimum(error, least)
    return best


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the inverse of `hessian` + damping * its mean diagonal, float32 [K, K].

    Inputs that were always 0 have no say: their diagonal is taken as 1.
    """
    matrix = hessian.double()
    diagonal = matrix.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += damping * diagonal.mean()
    factor: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(matrix)), upper=True)
    return factor.float()


@torch.inference_mode()
def round_weight(
    weight: Tensor, hessian: Tensor, damping: float, clips: tuple[float, ...] = CLIPS, *, grouped: bool = False
) -> tuple[Tensor, Tensor]:
    """int8 [N, K] and scales float32 [N] of a weight [N, K] whose inputs have the second moments `hessian` = sum x x^T [K, K];
    with `grouped`, INT4 integers and scales float16 [N, G].

    Inputs are taken in falling order of their second moment; the error of each, as far as later ones can make up for it,
    is taken from their weights before these are rounded. Scales are chosen before that: groups are neighbours in the order in
    which inputs lie, not in that in which they are rounded.
    """
    diagonal = hessian.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True)
    factor = inverse_factor(hessian[order][:, order], damping)
    integers = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    size = GROUP if grouped else len(order)
    scales = torch.empty(len(weight), -(-len(order) // size), device=weight.device)
    importance, group_of = diagonal / diagonal.sum().clamp(min=1e-30), (order // size).tolist()
    for start in range(0, len(weight), ROWS):
        rows = slice(start, start + ROWS)
        part = weight[rows]
        scales[rows] = groups.group_scales(part, importance) if grouped else scales_of(part, importance, clips)[:, None]
        steps, to_integers = scales[rows].T.contiguous(), groups.nearest if grouped else _integers
        integers[rows, order] = _round_rows(part[:, order].T.contiguous(), factor, steps, group_of, to_integers).T
    return integers, scales.half() if grouped else scales[:, 0]


def _round_rows(
    left: Tensor, factor: Tensor, scales: Tensor, group_of: list[int], to_integers: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Integers [K, N] of weights `left` [K, N], which are used up; `scales` [G, N] by the group of each input."""
    integers = torch.empty(left.shape, dtype=torch.int8, device=left.device)
    for start in range(0, len(left), BLOCK):
        end = min(start + BLOCK, len(left))
        errors = torch.empty(end - start, left.shape[1], device=left.device)
        for k in range(start, end):
            step = scales[group_of[k]]
            rounded = to_integers(left[k], step)
            integers[k] = rounded
            errors[k - start] = (left[k] - rounded * step) / factor[k, k]
            left[k + 1 : end].addr_(factor[k, k + 1 : end], errors[k - start], alpha=-1)
        left[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return integers


def _integers(weight: Tensor, scales: Tensor) -> Tensor:
    return torch.round(weight / torch.where(scales > 0, scales, 1)).clamp_(-127, 127)
