"""Rounding in which later weights compensate for the errors of earlier ones (Frantar et al., GPTQ, arXiv:2210.17323)."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

from belle_compile.compiler.ir.workers import in_order, torch_threads
from belle_compile.passes.quantization import groups

Tensor = torch.Tensor

BLOCK = 128  # inputs whose errors are carried to the rest at once
INNER = 16  # of these, those whose errors are carried to the others of the block at once
TILE = 1 << 18  # weights whose scales are chosen at a time, so that they stay in the cache
ROWS = 2048  # outputs that one thread rounds at a time
SMALL = 2048  # moments of fewer inputs are factored on one core
CLIPS = (1.0, 0.98, 0.96, 0.94, 0.92, 0.90)  # scales tried, as fractions of absmax / 127


def scales_of(weight: Tensor, importance: Tensor, clips: tuple[float, ...] = CLIPS) -> Tensor:
    """float32 [N]: for each row of a weight [N, K], absmax / 127 times one of `clips`.

    The clip is the one with the least squared rounding error, where inputs are weighted by `importance` [K]; of clips with
    equal errors it is the first.
    """
    tiles = torch.split(weight, max(1, TILE // weight.shape[1]))
    return torch.cat([_scales_of_tile(tile, importance, clips) for tile in tiles])


def _scales_of_tile(weight: Tensor, importance: Tensor, clips: tuple[float, ...]) -> Tensor:
    widest = weight.abs().amax(dim=1) / groups.LIMIT
    best, least = widest, torch.full_like(widest, torch.inf)
    for clip in clips:
        scales = widest * clip
        difference = torch.addcmul(weight, groups.nearest(weight, scales[:, None], bits=8), scales[:, None], value=-1)
        error = difference.square_() @ importance
        best, least = torch.where(error < least, scales, best), torch.minimum(error, least)
    return best


def compensation(hessian: Tensor, damping: float) -> Tensor:
    """How the error of each input is compensated for by later ones: float32 [K, K], upper triangular with a diagonal of ones.

    A row with the errors e [K] changes outputs by e^T H e. That is a sum of squares, one for each input k: with H = U D U^T and
    an upper triangular U, sum_j U[j, k] e_j over j <= k. It is least where the error of input k makes up for those of inputs
    before. H is `hessian` + `damping` * its mean diagonal; the diagonal of inputs that were always 0 is taken as 1, so that
    they have no influence. U is the Cholesky factor of H with the order of inputs reversed. GPTQ's own formulas come to the
    same by a factor of the inverse.
    """
    matrix = hessian.double().flip(0, 1)
    diagonal = matrix.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += damping * diagonal.mean()
    factor = torch.linalg.cholesky(matrix)
    shares: Tensor = (factor / factor.diagonal()).float().flip(0, 1)
    return shares


@torch.inference_mode()
def round_weight(
    weight: Tensor,
    hessian: Tensor,
    damping: float,
    clips: tuple[float, ...] = CLIPS,
    *,
    group: int | None = None,
    bits: int = 4,
    cores: int = 1,
) -> tuple[Tensor, Tensor]:
    """Round a weight [N, K] whose inputs have the second moments `hessian` = sum x x^T [K, K].

    Returns int8 integers [N, K] and float32 scales [N]; with `group`, integers of `bits` bits, 4, 6 or 8, and float16 scales
    [N, G], one for every `group` inputs. Inputs are rounded in descending order of their second moment. The error of each is
    subtracted from the weights of later ones, as far as these can compensate for it, before they are rounded. Scales are chosen
    before the first rounding: groups are neighbours in the order in which inputs lie, not in the order in which they are
    rounded. Rows do not depend on each other and are divided among the `cores`.
    """
    diagonal = hessian.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True)
    with torch_threads(cores if len(order) >= SMALL else 1):
        shares = compensation(hessian[order][:, order], damping)
    integers = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    size = group or len(order)
    scales = torch.empty(len(weight), -(-len(order) // size), device=weight.device)
    importance, group_of = diagonal / diagonal.sum().clamp(min=1e-30), (order // size).tolist()
    limits = groups.limits(bits if group else 8)
    restored = torch.argsort(order)

    @torch.inference_mode()
    def round_part(number: int) -> None:
        rows = slice(number * ROWS, (number + 1) * ROWS)
        part = weight[rows]
        scales[rows] = (
            groups.group_scales(part, importance, group, bits) if group else scales_of(part, importance, clips)[:, None]
        )
        steps = scales[rows].T.contiguous()
        integers[rows] = _round_rows(part.T[order], shares, steps, group_of, limits)[restored].T

    parts = -(-len(weight) // ROWS)
    workers = min(cores, parts)
    deque(in_order(round_part, parts, workers, cores=workers), maxlen=0)
    return integers, scales.half() if group else scales[:, 0]


def _round_rows(weight: Tensor, shares: Tensor, scales: Tensor, group_of: Sequence[int], limits: tuple[int, int]) -> Tensor:
    """Integers [K, N] of a transposed weight [K, N]; `scales` [G, N] by the group of each input."""
    integers = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    divisors, rounded, wanted = torch.where(scales == 0, 1, scales), torch.empty_like(weight[0]), weight.clone()
    for start in range(0, len(weight), BLOCK):
        end = min(start + BLOCK, len(weight))
        errors = torch.empty(end - start, weight.shape[1], device=weight.device)
        for inner in range(start, end, INNER):
            stop = min(inner + INNER, end)
            for k in range(inner, stop):
                group, error = group_of[k], errors[k - start]
                torch.div(wanted[k], divisors[group], out=rounded).round_().clamp_(*limits)
                integers[k] = rounded
                torch.addcmul(weight[k], rounded, scales[group], value=-1, out=error)
                wanted[k + 1 : stop].addr_(shares[k, k + 1 : stop], error)
            wanted[stop:end].addmm_(shares[inner:stop, stop:end].T, errors[inner - start : stop - start])
        wanted[end:].addmm_(shares[start:end, end:].T, errors)
    return integers
