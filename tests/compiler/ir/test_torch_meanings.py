"""The ops in torch that are computed otherwise than by torch's own functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from belle_compile.compiler.ir import meanings, torch_meanings


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("bias", [None, random(48)], ids=["no bias", "bias"])
def test_a_linear_is_torchs(bias: torch.Tensor | None) -> None:
    x, weight = random(7, 32), random(48, 32)
    expected = torch.nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(torch_meanings.linear(x, weight, bias), expected, rtol=1e-5, atol=1e-5)
    strided = torch_meanings.linear(x.T.contiguous().T, weight.T.contiguous().T, bias)
    torch.testing.assert_close(strided, expected, rtol=1e-5, atol=1e-5)


def test_a_coarse_linear_rounds_its_operands_and_its_result_once() -> None:
    """Its sums are of float32: of 2,000 products that nearly cancel each other out, little is lost."""
    x, weight, bias = random(7, 2000), random(48, 2000).bfloat16(), random(48)
    exact = x.bfloat16().double() @ weight.double().T
    found = torch_meanings.coarse_linear(x, weight, bias) - bias
    assert found.dtype == torch.float32
    assert ((found - exact).abs() <= exact.abs() * 2**-8 + 1e-3).all()


@pytest.mark.parametrize("block", [1, 2, 4, 8, 64, 128])
def test_the_hadamard_transform_is_numpys(block: int) -> None:
    x = random(3, 128)
    expected = torch.from_numpy(meanings.block_hadamard(x.numpy(), block=block))
    torch.testing.assert_close(torch_meanings.block_hadamard(x, block=block), expected, rtol=1e-5, atol=1e-5)


def test_a_rotation_turns_pairs_of_halves() -> None:
    x, cos, sin = random(5, 3, 8), random(5, 4), random(5, 4)
    swapped = torch.cat([-x[..., 4:], x[..., :4]], dim=-1)
    expected = x * cos.repeat(1, 2)[:, None] + swapped * sin.repeat(1, 2)[:, None]
    torch.testing.assert_close(torch_meanings.rotate(x, torch.cat([cos, sin], dim=1)), expected)


@pytest.mark.parametrize("kv_heads", [2, 6], ids=["shared keys", "keys for each head"])
def test_long_sequences_attend_to_themselves(kv_heads: int) -> None:
    """Sequences on both sides of the length from which heads with shared keys are multiplied together."""
    lengths, scale = (1, 300, 128, 129, 40), 0.3
    q, k, v = random(sum(lengths), 6 * 8), random(sum(lengths), kv_heads * 8), 2 * random(sum(lengths), kv_heads * 8)
    sequences = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    options: dict[str, Any] = {"layer": 0, "num_heads": 6, "num_kv_heads": kv_heads, "head_dim": 8, "scale": scale}
    found = torch_meanings.attention(q, k, v, sequences, sequences, None, None, None, **options)
    for number in range(len(lengths)):
        own = sequences == number
        queries = q[own].double().view(-1, 6, 8)
        keys, values = (x[own].double().view(-1, kv_heads, 8).repeat_interleave(6 // kv_heads, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * scale
        weights = torch.softmax(scores + torch.full_like(scores, -torch.inf).triu(1), -1)
        expected = torch.einsum("hqk,khd->qhd", weights, values).reshape(-1, 48)
        torch.testing.assert_close(found[own].double(), expected, rtol=1e-4, atol=1e-5)
