"""Rotations: the function stays, outliers go."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from belle_compile.passes.base import PassResult
from belle_compile.passes.pipeline import run_pipeline
from belle_compile.passes.rotation.fold_embedding_norm import FoldEmbeddingNorm
from belle_compile.passes.rotation.fold_layer_norms import FoldLayerNorms
from belle_compile.passes.rotation.hadamard import Rotation
from belle_compile.passes.rotation.rotate_residual import RotateResidual
from belle_compile.passes.rotation.rotate_values import RotateValues
from tests.passes.helpers import Tiny, assert_same_results, bloom, check_pass, llama, run_steps, side_by_side
from tests.pipelines import PIPELINES

ROUNDING = 2e-6  # float32 sums in another order


@pytest.mark.parametrize("size", [1, 2, 5, 12, 64, 72, 576])
def test_rotations_are_orthogonal_and_left_is_the_transpose(size: int) -> None:
    rotation = Rotation(size, seed=3)
    q = rotation.right(np.eye(size, dtype=np.float32))
    np.testing.assert_allclose(q.T @ q, np.eye(size), atol=1e-5)
    weight = np.random.default_rng(0).standard_normal((size, 7)).astype(np.float32)
    np.testing.assert_allclose(rotation.left(weight), q.T @ weight, atol=1e-5)
    np.testing.assert_array_equal(rotation.right(weight.T), Rotation(size, seed=3).right(weight.T))


def test_an_outlier_is_spread() -> None:
    outlier = np.zeros((1, 576), np.float32)
    outlier[0, 17] = 100
    assert np.abs(Rotation(576, 0).right(outlier)).max() < 15


def test_residual_text(golden: Callable[[str, str], None]) -> None:
    model = llama(layers=1, last_norm=True)
    before, result = check_pass(RotateResidual(), model)
    assert result == PassResult(1 + 2 + 6)  # table; attn.o, mlp.down; q, k, v, gate, up, head
    golden("rotate-residual", side_by_side(before, RotateResidual(), model))


def test_values_text(golden: Callable[[str, str], None]) -> None:
    model = bloom(layers=1)
    before, result = check_pass(RotateValues(), model)
    assert result == PassResult(1)
    golden("rotate-values", side_by_side(before, RotateValues(), model))


@pytest.mark.parametrize("step", [RotateResidual(), RotateResidual(seed=9), RotateValues()], ids=str)
def test_same_logits(step: RotateResidual | RotateValues) -> None:
    model = llama(last_norm=True)
    before, result = check_pass(step, model)
    assert result.changes
    assert_same_results(before, model, rtol=ROUNDING)
    assert any((a != b).any() for a, b in zip(run_steps(before), run_steps(model), strict=True)), "nothing was rotated"


def test_values_of_a_fused_projection_with_biases() -> None:
    model = bloom()
    before, result = check_pass(RotateValues(), model)
    assert result == PassResult(2)
    assert_same_results(before, model, rtol=ROUNDING)


def tied_head() -> ir.Model:
    b = Tiny()
    x = b.op("Add", b.linear(b.norm(b.x, "norm", "rms"), "mlp", 32, bias=True), b.x, name="add")
    normed = b.norm(b.op("Gather", x, b.inputs.logit_rows, name="rows"), "last_norm", "rms")
    return b.finish(b.op("Gemm", normed, b.graph.initializers["embed.weight"], name="lm_head", transB=1))


def test_a_tied_head_gets_its_own_weight() -> None:
    model = tied_head()
    before, result = check_pass(RotateResidual(), model)
    assert result == PassResult(4)
    assert {"embed.weight.rotated", "lm_head.weight.rotated"} <= set(model.graph.initializers)
    assert "embed.weight" not in model.graph.initializers
    assert_same_results(before, model, rtol=ROUNDING)


def test_a_tied_head_keeps_the_table(golden: Callable[[str, str], None]) -> None:
    model = tied_head()
    step = RotateResidual(keeps_tied=True)
    before, result = check_pass(step, model)
    assert result == PassResult(4) and step.options == {"seed": 0, "keeps_tied": True}
    tables = [value for value in model.graph.initializers.values() if value.shape is not None and value.shape[0] == 40]
    assert [value.name for value in tables] == ["embed.weight.rotated"] and len(list(tables[0].uses())) == 2
    assert_same_results(before, model, rtol=ROUNDING)
    golden("rotate-residual-tied", side_by_side(before, step, model))


@pytest.mark.parametrize("preset", ["int4", "int8"])
def test_int4_stores_a_tied_table_once(preset: str) -> None:
    """The product before the head has INT8 weights, as the head has."""
    model = tied_head()
    run_pipeline(model, PIPELINES[preset])
    tables = [name for name, value in model.graph.initializers.items() if value.shape is not None and value.shape[0] == 40
              and len(value.shape) == 2]  # fmt: skip
    assert len(tables) == (1 if preset == "int4" else 2)
    assert_same_results(tied_head(), model, rtol=0.3 if preset == "int4" else 0.06)
    names = {str(node.name) for node in model.graph if node.op_type == "QuantizedLinear"}
    assert {"lm_head", "lm_head.gain"} <= names if preset == "int4" else "lm_head.gain" not in names


def test_layer_norms_are_refused() -> None:
    model = bloom()
    before, result = check_pass(RotateResidual(), model)
    assert result == PassResult(0, ("embed_norm: the residual stream is read by LayerNormalization, not by RMSNormalization",))
    assert_same_results(before, model)


def test_a_stream_with_another_reader_is_refused() -> None:
    b = Tiny()
    x = b.op("Add", b.linear(b.x, "left", 32), b.x, name="add")
    model = b.head(x)
    _, result = check_pass(RotateResidual(), model)
    assert result == PassResult(0, ("left: the residual stream is read by Gemm, not by RMSNormalization",))


def test_values_with_another_reader_are_refused() -> None:
    b = Tiny()
    q, v = b.linear(b.x, "q", 32), b.linear(b.x, "v", 32)
    attended = b.linear(b.attention(q, q, v, "attn", 0), "o", 32)
    model = b.head(b.op("Add", attended, v, name="add"))
    _, result = check_pass(RotateValues(), model)
    assert result == PassResult(0, ("attn: its values are also read by add",))


def test_fold_embedding_norm_text(golden: Callable[[str, str], None]) -> None:
    model = bloom(layers=1)
    before, result = check_pass(FoldEmbeddingNorm(), model)
    assert result == PassResult(1)
    golden("fold-embedding-norm", side_by_side(before, FoldEmbeddingNorm(), model))
    assert_same_results(before, model)


def test_fold_layer_norms_text(golden: Callable[[str, str], None]) -> None:
    model = normed_bloom(layers=1)
    before, result = check_pass(FoldLayerNorms(), model)
    assert result == PassResult(3)
    golden("fold-layer-norms", side_by_side(before, FoldLayerNorms(), model))
    assert_same_results(before, model, rtol=ROUNDING)


def test_bloom_is_rotated_after_its_norms_are_folded() -> None:
    model = bloom(last_norm=True)
    before = model.clone()
    for step in (FoldEmbeddingNorm(), FoldLayerNorms(), RotateResidual(), RotateValues()):
        _, result = check_pass(step, model)
        assert result.changes and not result.refusals
    assert not any(node.op_type == "LayerNormalization" for node in model.graph)
    assert_same_results(before, model, rtol=5e-6)


def test_a_residual_after_the_norm_is_refused() -> None:
    model = bloom(residual_after_norm=True, last_norm=True)
    FoldEmbeddingNorm().run(model)
    before, result = check_pass(FoldLayerNorms(), model)
    assert result == PassResult(0, ("h.0.input_norm: its output is read by something else than linears",))
    assert "h.0.input_norm" in {node.name for node in model.graph}
    assert_same_results(before, model)


def test_an_embedding_with_another_reader_keeps_its_norm() -> None:
    b = Tiny()
    x = b.op("Add", b.norm(b.x, "norm", "layer"), b.x, name="add")
    model = b.head(x)
    before, result = check_pass(FoldEmbeddingNorm(), model)
    assert result == PassResult(0, ("norm: the embedding is also read by add",))
    assert_same_results(before, model)


def normed_bloom(layers: int) -> ir.Model:
    """A BLOOM whose embedding norm is folded already."""
    model = bloom(layers=layers, last_norm=True)
    FoldEmbeddingNorm().run(model)
    return model


def test_an_unmatched_graph_is_unmodified() -> None:
    def plain() -> ir.Model:
        b = Tiny()
        return b.head(b.linear(b.x, "left", 32))

    for step in (FoldEmbeddingNorm(), FoldLayerNorms(), RotateResidual(), RotateValues()):
        model = plain()
        before, result = check_pass(step, model)
        assert result.changes == 0
        assert_same_results(before, model)
