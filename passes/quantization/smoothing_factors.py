"""Factors between activations and weights for which rounding both to INT8 is expected to change a linear's outputs least."""

from __future__ import annotations

from collections.abc import Callable

import torch

Tensor = torch.Tensor

_STEPS, _RATE = 60, 0.08  # of Adam, on logarithms of factors
_POWER = 16  # the norm that stands for a maximum, so that all large channels have a gradient
_ROWS = 128  # rows of activations and weights whose maxima are computed

_LEAST = 1e-12  # magnitude that stands for 0


def least_expected_error(
    start: Tensor, x: Tensor, weight: Tensor, block: int | None, expand: Callable[[Tensor], Tensor] = lambda factors: factors
) -> Tensor:
    """float32 [K]: factors s near `expand(start)` that minimize the expected error of (x / s) @ (weight * s).T after rounding.

    Values that share a scale have a rounding error with the variance (largest / 127)^2 / 12 each: those of a row of x [T, K] or
    of the weight [N, K], or of `block` neighbours in it. Errors of x are multiplied by weights, and those of weights by x, so
    that the expected error is a sum of products of powers of s: a convex function of their logarithms, which gradient descent
    minimizes from any start. Factors that are shared are computed once: `expand` makes [K] of them.
    """
    outputs, inputs = weight.shape
    size = block or inputs
    energy = _blocks(weight.square().sum(dim=0)[None], size)[0]
    power = _blocks(x.square().sum(dim=0)[None], size)[0]
    parts = [each[:: max(1, len(each) // _ROWS)] for each in (x, weight)]
    activations, weights = (_blocks(part.abs() + _LEAST, size).log() for part in parts)
    of_x, of_weight = len(x) / len(parts[0]), outputs / len(parts[1])

    def error(logarithms: Tensor) -> Tensor:
        each = _blocks(expand(logarithms)[None], size)[0]
        of_activations = of_x * _maxima(activations - each) * (energy * (2 * each).exp()).sum(dim=-1)
        of_weights = of_weight * _maxima(weights + each) * (power * (-2 * each).exp()).sum(dim=-1)
        return (of_activations + of_weights).sum().log()

    with torch.inference_mode(False), torch.enable_grad():
        logarithms = start.clone().log().requires_grad_()
        optimizer = torch.optim.Adam([logarithms], lr=_RATE)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, _STEPS)
        for _ in range(_STEPS):
            (logarithms.grad,) = torch.autograd.grad(error(logarithms), logarithms)
            optimizer.step()
            schedule.step()
    return expand(logarithms.detach().exp())


def _blocks(rows: Tensor, size: int) -> Tensor:
    """[rows, blocks, size]: a last block is filled with zeros."""
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % size)).view(len(rows), -1, size)


def _maxima(logarithms: Tensor) -> Tensor:
    """[blocks]: the sum over rows of the square of each block's maximum, as a norm of high power, of values given by their
    logarithms [rows, blocks, size]."""
    return (torch.logsumexp(_POWER * logarithms, dim=-1) * (2 / _POWER)).exp().sum(dim=0)
