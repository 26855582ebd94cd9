"""The rotation of a residual stream whose LayerNorms stay: the function stays, and means commute with it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from belle_compile.passes.base import PassResult
from belle_compile.passes.rotation import rotate_centered_residual
from belle_compile.passes.rotation.hadamard import CenteredRotation
from belle_compile.passes.rotation.rotate_centered_residual import RotateCenteredResidual
from tests.passes.helpers import assert_same_results, bloom, check_pass, count, llama, run_steps, side_by_side

ROUNDING = 1e-5  # float32 sums in another order, and an embedding norm that divides by numbers near its epsilon


@pytest.mark.parametrize("size", [2, 5, 12, 64, 72, 576])
def test_the_all_ones_vector_stays(size: int) -> None:
    rotation = CenteredRotation(size, seed=3)
    q = rotation.right(np.eye(size, dtype=np.float32))
    np.testing.assert_allclose(q.T @ q, np.eye(size), atol=1e-5)
    np.testing.assert_allclose(q.sum(axis=0), 1, atol=1e-4)
    np.testing.assert_allclose(q.sum(axis=1), 1, atol=1e-4)
    weight = np.random.default_rng(0).standard_normal((size, 7)).astype(np.float32)
    np.testing.assert_allclose(rotation.left(weight), q.T @ weight, atol=1e-5)


def test_an_outlier_is_spread() -> None:
    outlier = np.zeros((1, 576), np.float32)
    outlier[0, 17] = 100
    assert np.abs(CenteredRotation(576, 0).right(outlier)).max() < 15


def test_text(golden: Callable[[str, str], None]) -> None:
    model = bloom(layers=1, last_norm=True)
    before, result = check_pass(RotateCenteredResidual(), model)
    assert result == PassResult(1 + 2 + 3)  # table; attn.dense, mlp.down; qkv, mlp.up, head
    golden("rotate-centered-residual", side_by_side(before, RotateCenteredResidual(), model))


@pytest.mark.parametrize("seed", [0, 9])
def test_same_logits(seed: int) -> None:
    model = bloom(last_norm=True)
    before, result = check_pass(RotateCenteredResidual(seed), model)
    assert result.changes and not result.refusals
    assert count(model, "LayerNormalization") == count(before, "LayerNormalization") and not count(model, "RMSNormalization")
    assert_same_results(before, model, rtol=ROUNDING)
    assert any((a != b).any() for a, b in zip(run_steps(before), run_steps(model), strict=True)), "nothing was rotated"


def test_a_rotation_that_moves_the_mean_is_rejected_by_parity(monkeypatch: pytest.MonkeyPatch) -> None:
    from belle_compile.passes.rotation.hadamard import Rotation

    monkeypatch.setattr(rotate_centered_residual, "CenteredRotation", Rotation)
    model = bloom(last_norm=True)
    before = model.clone()
    RotateCenteredResidual().run(model)
    with pytest.raises(AssertionError):
        assert_same_results(before, model, rtol=ROUNDING)


def test_embeddings_keep_their_lengths() -> None:
    """Rows of very different lengths after the norm, and one of zeros, which a norm of constant gain gives by its epsilon."""
    model = bloom(last_norm=True)
    gain = model.graph.initializers["embed_norm.weight"]
    values = np.zeros(32, np.float32)
    values[:3] = 30.0
    gain.const_value = ir.Tensor(values, name="embed_norm.weight")
    model.graph.initializers["embed_norm.bias"].const_value = ir.Tensor(np.zeros(32, np.float32), name="embed_norm.bias")
    before = model.clone()
    assert RotateCenteredResidual().run(model).changes
    assert_same_results(before, model, rtol=ROUNDING)


def test_a_residual_after_the_norm_is_refused() -> None:
    model = bloom(residual_after_norm=True, last_norm=True)
    before, result = check_pass(RotateCenteredResidual(), model)
    assert result == PassResult(0, ("h.0.input_norm: its output is read by something else than linears",))
    assert_same_results(before, model)


def test_a_gain_of_zero_before_the_head_is_refused() -> None:
    model = bloom(last_norm=True)
    values = np.ones(32, np.float32)
    values[5] = 0
    model.graph.initializers["norm.weight"].const_value = ir.Tensor(values, name="norm.weight")
    _, result = check_pass(RotateCenteredResidual(), model)
    assert result == PassResult(0, ("norm: a gain is 0, so that its bias cannot be expressed by the rotated norm",))


def test_a_model_without_layer_norms_is_left_alone() -> None:
    model = llama(last_norm=True)
    before, result = check_pass(RotateCenteredResidual(), model)
    assert result == PassResult()
    assert_same_results(before, model)
