"""Weight formats of few bits in plain torch: how a weight is rounded to one, and how many bytes it then takes.

A format here is a proposal to be judged by `benchmarks.int4_schemes`; the compiler makes only some of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

Tensor = torch.Tensor

DAMPING = 0.01  # of Hessians, as a share of their mean diagonal
BLOCK = 128  # inputs whose errors GPTQ carries to the rest at once
SHRINKS = tuple(round(1 - 0.04 * i, 2) for i in range(8))  # ranges tried, as fractions of the range of a group's weights


@dataclass(frozen=True)
class Format:
    """Integers of `bits` bits with a scale for every `group` inputs of an output (None: for all of them).

    With `zeros`, a scale comes with an integer of `bits` bits that stands for 0; without, integers are signed. A scale has 16
    bits, or `scale_bits` that count steps of one float16 number for each output. With `minimums`, the smallest value of a group
    is stored in as many bits as its scale, as in Q4_K, in place of an integer for 0.
    """

    bits: int
    group: int | None = None
    zeros: bool = False
    scale_bits: int = 16
    minimums: bool = False

    def __str__(self) -> str:
        kind = "minimums" if self.minimums else "zero points" if self.zeros else "symmetric"
        scales = "" if self.scale_bits == 16 else f", scales of {self.scale_bits} bits"
        return f"{self.bits} bits, {f'groups of {self.group}' if self.group else 'a scale an output'}, {kind}{scales}"

    def bytes_of(self, outputs: int, inputs: int) -> float:
        """Bytes of a weight [outputs, inputs], without padding."""
        groups = -(-inputs // (self.group or inputs))
        offsets = self.scale_bits if self.minimums else self.bits if self.zeros else 0
        # One scale an output is a float32 number in the engine's INT8 layers.
        bits = inputs * self.bits + groups * ((self.scale_bits if self.group else 32) + offsets)
        bits += 0 if self.scale_bits == 16 else 32 if self.minimums else 16
        return outputs * bits / 8

    def grid(self, weight: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and offsets [N, K] of every input of a weight [N, K]: it is rounded to scale * (integer + offset).

        Of the ranges tried, each group takes the one with the least squared error, where inputs are weighted by `importance`
        [K]."""
        outputs, inputs = weight.shape
        group = self.group or inputs
        parts = torch.nn.functional.pad(weight, (0, -inputs % group)).view(outputs, -1, group)
        factors = torch.nn.functional.pad(importance, (0, -inputs % group)).view(1, -1, group)
        best: tuple[Tensor, Tensor] | None = None
        least = torch.full(parts.shape[:2], torch.inf)
        for scales, offsets in self._candidates(parts):
            scales, offsets = self._stored(scales, offsets)
            error = ((parts - self._nearest(parts, scales[..., None], offsets[..., None])).square_() * factors).sum(-1)
            if best is None:
                best, least = (scales, offsets), error
                continue
            better = error < least
            best = torch.where(better, scales, best[0]), torch.where(better, offsets, best[1])
            least = torch.minimum(error, least)
        assert best is not None
        spread = [each.repeat_interleave(group, dim=1)[:, :inputs] for each in best]
        return spread[0], spread[1]

    def _candidates(self, parts: Tensor) -> list[tuple[Tensor, Tensor]]:
        low, high, top = parts.amin(dim=2), parts.amax(dim=2), 2**self.bits - 1
        if not (self.zeros or self.minimums):
            # The sign of a scale decides which end of the weights gets the additional negative level.
            outermost = torch.where(high > -low, high, low) / -(2 ** (self.bits - 1))
            if self.bits == 8:
                outermost = torch.maximum(high, -low) / 127
            return [(outermost * shrink, torch.zeros_like(outermost)) for shrink in SHRINKS]
        low, high = low.clamp(max=0), high.clamp(min=0)
        found = []
        for shrink in SHRINKS:
            scales = (high - low) * shrink / top
            center = low + (high - low) * (1 - shrink) / 2
            offsets = center / torch.where(scales == 0, 1, scales)
            found.append((scales, offsets if self.minimums else torch.round(offsets).clamp(-top, 0)))
        return found

    def _stored(self, scales: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and offsets as the format represents them."""
        exact = scales
        if self.scale_bits < 16:
            scales = _steps(scales, self.scale_bits, signed=not (self.zeros or self.minimums))
        elif self.group:
            scales = scales.half().float()
        if not self.minimums:
            return scales, offsets
        minimums = exact * offsets
        minimums = -_steps(-minimums, self.scale_bits, signed=False) if self.scale_bits < 16 else minimums.half().float()
        return scales, torch.where(scales == 0, 0, minimums / torch.where(scales == 0, 1, scales))

    def _nearest(self, weight: Tensor, scales: Tensor, offsets: Tensor) -> Tensor:
        """The values of the format that are nearest to a weight."""
        top, half = 2**self.bits - 1, 2 ** (self.bits - 1)
        lowest, highest = (0, top) if self.zeros or self.minimums else (-half + (self.bits == 8), half - 1)
        integers = torch.round(weight / torch.where(scales == 0, 1, scales) - offsets).clamp_(lowest, highest)
        return (integers + offsets) * scales

    def round_nearest(self, weight: Tensor, importance: Tensor) -> Tensor:
        """The weight [N, K] rounded, as float32."""
        return self._nearest(weight, *self.grid(weight, importance))

    def round_gptq(self, weight: Tensor, hessian: Tensor) -> Tensor:
        """The weight [N, K] rounded by GPTQ with act-order, for inputs with the second moments `hessian` [K, K]."""
        diagonal = hessian.diagonal()
        order = torch.argsort(diagonal, descending=True, stable=True)
        factor = _inverse_factor(hessian[order][:, order])
        scales, offsets = self.grid(weight, diagonal / diagonal.mean())
        left, scales, offsets = (each[:, order].T.contiguous() for each in (weight, scales, offsets))
        rounded = torch.empty_like(left)
        for start in range(0, len(left), BLOCK):
            end = min(start + BLOCK, len(left))
            errors = torch.empty(end - start, left.shape[1])
            for k in range(start, end):
                rounded[k] = self._nearest(left[k], scales[k], offsets[k])
                errors[k - start] = (left[k] - rounded[k]) / factor[k, k]
                left[k + 1 : end].addr_(factor[k, k + 1 : end], errors[k - start], alpha=-1)
            left[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
        result = torch.empty_like(weight)
        result[:, order] = rounded.T
        return result


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse of a damped Hessian, float32 [K, K]; inputs that were always 0 count as 1."""
    matrix = hessian.double()
    diagonal = matrix.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += DAMPING * diagonal.mean()
    factor: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(matrix)), upper=True)
    return factor.float()


def _steps(values: Tensor, bits: int, *, signed: bool) -> Tensor:
    """Values [N, G] as integers of `bits` bits times a float16 number for each row."""
    top = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    step = (values.abs().amax(dim=1, keepdim=True) / top).half().float()
    rounded: Tensor = torch.round(values / torch.where(step == 0, 1, step)).clamp_(-top if signed else 0, top) * step
    return rounded
