"""Weight formats that benchmarks.int4_schemes compares, and the model with shuffled channels that it compares them on."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.int4_schemes import R24, R124, in_basis, shuffled
from benchmarks.weight_formats import Format

FORMATS = (
    Format(4, 32), Format(4, 32, zeros=True), Format(4, 32, zeros=True, scale_bits=8),
    Format(4, 32, scale_bits=6, minimums=True), Format(6, 32),
)  # fmt: skip


def random_weight(outputs: int = 48, inputs: int = 80) -> torch.Tensor:
    """A weight whose last group is not full."""
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0)) / 10


def tiny_llama() -> LlamaForCausalLM:
    """A model with a tied head, whose norms have gains."""
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
                         num_key_value_heads=2, vocab_size=50, tie_word_embeddings=True)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.rand_like(parameter) + 0.5 if parameter.ndim == 1 else 0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_a_group_has_no_more_values_than_its_bits_allow(form: Format) -> None:
    rounded = form.round_nearest(random_weight(), torch.ones(80))
    assert max(len(torch.unique(group)) for group in rounded[:, :64].reshape(-1, 32)) <= 2**form.bits


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_gptq_changes_outputs_less_than_the_nearest_values(form: Format) -> None:
    weight = random_weight()
    x = torch.randn(512, 8, generator=torch.Generator().manual_seed(1)) @ torch.randn(8, 80) + 0.1 * torch.randn(512, 80)
    hessian = x.T @ x

    def error(rounded: torch.Tensor) -> float:
        return float((x @ (rounded - weight).T).square().sum())

    assert error(form.round_gptq(weight, hessian)) < 0.7 * error(form.round_nearest(weight, hessian.diagonal()))


def test_a_weight_on_the_grid_of_a_format_is_found_again() -> None:
    """Why a checkpoint that was expanded from Q4_1 flatters formats of its own kind."""
    grid = Format(4, 32, minimums=True)
    on_grid = torch.randint(0, 16, (16, 64)) * 0.0625 - 0.4375
    on_grid[:, ::32], on_grid[:, 1::32] = -0.4375, 0.5  # both ends occur in each group
    off_grid = on_grid[:, torch.randperm(64)] * torch.linspace(0.8, 1.2, 64)
    equal = torch.ones(64)
    assert (grid.round_nearest(on_grid, equal) - on_grid).abs().max() < 1e-3
    assert (grid.round_nearest(off_grid, equal) - off_grid).abs().max() > 1e-2


def test_bytes() -> None:
    assert Format(4, 32).bytes_of(2, 64) == 2 * (32 + 2 * 2)
    assert Format(4, 32, zeros=True, scale_bits=8).bytes_of(2, 64) == 2 * (32 + 2 * 1.5 + 2)
    assert Format(4, 32, scale_bits=6, minimums=True).bytes_of(2, 64) == 2 * (32 + 2 * 1.5 + 4)
    assert Format(8).bytes_of(2, 64) == 2 * (64 + 4)


@pytest.mark.parametrize("rotations", [(), R24, R124], ids=["none", "R2 R4", "R1 R2 R4"])
def test_shuffled_and_rotated_models_compute_the_same(rotations: tuple[str, ...]) -> None:
    model, ids = tiny_llama(), torch.arange(20)[None]
    other = shuffled(model)
    assert not torch.equal(other.model.layers[0].mlp.down_proj.weight, model.model.layers[0].mlp.down_proj.weight)
    with torch.inference_mode():
        exact = model(ids).logits
        for found in (other(ids).logits, in_basis(other, rotations).model(ids).logits):
            assert (found - exact).abs().max() < 1e-4 * exact.abs().max()
