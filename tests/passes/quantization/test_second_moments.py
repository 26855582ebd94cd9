"""Second moments are those of the whole input, and symmetric to the bit."""

from __future__ import annotations

import pytest
import torch

from belle_compile.passes.quantization.second_moments import SecondMoments, products


@pytest.mark.parametrize("inputs", [8, 128, 300])
def test_they_are_the_sum_over_all_parts(inputs: int) -> None:
    x = torch.randn(96, inputs, generator=torch.Generator().manual_seed(0))
    moments = SecondMoments()
    for part in torch.split(x, 40):
        moments.add(products(part))
    found = moments.matrix()
    assert found.dtype == torch.float32 and torch.equal(found, found.T)
    torch.testing.assert_close(found.double(), x.double().T @ x.double(), rtol=1e-5, atol=1e-4)
