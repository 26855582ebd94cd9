"""Factors between activations and weights with the least expected rounding error."""

from __future__ import annotations

import pytest
import torch

from belle_compile.compiler.ir.stream import quantized, rounded_blocks
from belle_compile.passes.quantization.smoothing_factors import least_expected_error

Tensor = torch.Tensor


def case(inputs: int = 96) -> tuple[Tensor, Tensor]:
    """Activations [T, K] with a few large channels, and a weight [N, K] with other ones."""
    random = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, inputs, generator=random) for rows in (160, 200))
    x[:, [3, 40]] *= 30
    weight[:, [7, 40]] *= 8
    return x, weight


def error(factors: Tensor, x: Tensor, weight: Tensor, block: int | None) -> float:
    """The squared error of the product after both are rounded."""
    rounded = (lambda values: quantized(values, 8)) if block is None else (lambda values: rounded_blocks(values, block))
    return float((rounded(x / factors) @ rounded(weight * factors).T - x @ weight.T).square().sum())


@pytest.mark.parametrize("block", [None, 32, 40])
def test_factors_lower_the_error_of_rounding(block: int | None) -> None:
    x, weight = case()
    ones = torch.ones(96)
    factors = least_expected_error(ones, x, weight, block)
    assert factors.shape == (96,) and bool((factors > 0).all())
    assert error(factors, x, weight, block) < 0.6 * error(ones, x, weight, block)
    again = least_expected_error(factors, x, weight, block)
    assert error(again, x, weight, block) == pytest.approx(error(factors, x, weight, block), rel=0.15), "a minimum"


def test_shared_factors_stay_shared() -> None:
    x, weight = case()
    factors = least_expected_error(torch.ones(48), x, weight, None, lambda shared: shared.repeat(2))
    assert torch.equal(factors[:48], factors[48:]) and error(factors, x, weight, None) < error(torch.ones(96), x, weight, None)


def test_channels_of_zeros_are_no_obstacle() -> None:
    x, weight = case()
    x[:, 5], weight[:, 6] = 0, 0
    assert bool(torch.isfinite(least_expected_error(torch.ones(96), x, weight, 32)).all())
