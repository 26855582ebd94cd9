"""Rounding in which later weights compensate for the errors of earlier ones (Frantar et al., GPTQ, arXiv:2210.17323)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from belle_compile.passes.quantization import groups

Tensor = torch.Tensor

BLOCK = 128  # inputs whose errors are carried to the rest at once
ROWS = 16_384  # outputs rounded at a time, so that a head of 250,880 rows is not in memory twice
CLIPS = (1.0, 0.98, 0.96, 0.94, 0.92, 0.90)  # scales tried, as fractions of absmax / 127


def scales_of(weight: Tensor, importance: Tensor, clips: tuple[float, ...] = CLIPS) -> Tensor:
    """float32 [N]: for each row of a weight [N, K], absmax / 127 times one of `clips`.

    The clip is the one with the least squared rounding error, where inputs are weighted by `importance` [K]; of clips with
    equal errors it is the first.
    """
    widest = weight.abs().amax(dim=1) / 127
    best, least = widest, torch.full_like(widest, torch.inf)
    for clip in clips:
        scales = widest * clip
        error = (weight - _integers(weight, scales[:, None]) * scales[:, None]).square_() @ importance
        best, least = torch.where(error < least, scales, best), torch.minimum(error, least)
    return best


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the inverse of `hessian` + damping * its mean diagonal, float32 [K, K].

    The diagonal of inputs that were always 0 is taken as 1, so that they have no influence.
    """
    matrix = hessian.double()
    diagonal = matrix.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += damping * diagonal.mean()
    factor: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(matrix)), upper=True)
    return factor.float()


@torch.inference_mode()
def round_weight(
    weight: Tensor,
    hessian: Tensor,
    damping: float,
    clips: tuple[float, ...] = CLIPS,
    *,
    group: int | None = None,
    bits: int = 4,
) -> tuple[Tensor, Tensor]:
    """Round a weight [N, K] whose inputs have the second moments `hessian` = sum x x^T [K, K].

    Returns int8 integers [N, K] and float32 scales [N]; with `group`, integers of `bits` bits, 4 or 8, and float16 scales
    [N, G], one for every `group` inputs. Inputs are rounded in descending order of their second moment. The error of each is
    subtracted from the weights of later ones, as far as these can compensate for it, before they are rounded. Scales are chosen
    before the first rounding: groups are neighbours in the order in which inputs lie, not in the order in which they are
    rounded.
    """
    diagonal = hessian.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True)
    factor = inverse_factor(hessian[order][:, order], damping)
    integers = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    size = group or len(order)
    scales = torch.empty(len(weight), -(-len(order) // size), device=weight.device)
    importance, group_of = diagonal / diagonal.sum().clamp(min=1e-30), (order // size).tolist()
    for start in range(0, len(weight), ROWS):
        rows = slice(start, start + ROWS)
        part = weight[rows]
        scales[rows] = (
            groups.group_scales(part, importance, group, bits) if group else scales_of(part, importance, clips)[:, None]
        )
        steps, to_integers = scales[rows].T.contiguous(), partial(groups.nearest, bits=bits) if group else _integers
        integers[rows, order] = _round_rows(part[:, order].T.contiguous(), factor, steps, group_of, to_integers).T
    return integers, scales.half() if group else scales[:, 0]


def _round_rows(
    left: Tensor, factor: Tensor, scales: Tensor, group_of: list[int], to_integers: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Integers [K, N] of weights `left` [K, N], which are overwritten; `scales` [G, N] by the group of each input."""
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
