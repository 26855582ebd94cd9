"""A rank's graph: its text, its weights beside the whole ones, the logits of all ranks together, what cannot be divided."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.ir.build import make_initializer
from belle_compile.compiler.ir.evaluate import PagedCache, evaluate_ranks
from belle_compile.compiler.ir.lazy import lazy, wholes_kept
from belle_compile.compiler.ir.ops import attributes_of, operand
from belle_compile.compiler.ir.signature import Role, TensorSpec
from belle_compile.compiler.ir.text import to_text
from belle_compile.compiler.ir.verify import verify
from belle_compile.passes.base import PassResult
from belle_compile.passes.partition.partition_tensors import PartitionTensors
from belle_compile.passes.partition.rank_graph import RankGraph
from belle_compile.passes.pipeline import at_fusion, run_pipeline, run_ranks
from belle_compile.passes.quantization.quantize_groups import QuantizeGroups
from belle_compile.passes.quantization.scheme import WeightScheme
from belle_compile.passes.rotation.rotate_activations import RotateActivations
from tests.passes.helpers import HEAD_DIM, VOCABULARY, Tiny, bloom, check_pass, count, llama, side_by_side
from tests.pipelines import PIPELINES

RANKS = 2
MODELS: dict[str, Callable[[], ir.Model]] = {
    "llama": lambda: llama(last_norm=True),
    "bloom": lambda: bloom(last_norm=True),
    "bloom-residual": lambda: bloom(residual_after_norm=True),
}


def quantized(name: str, preset: str) -> ir.Model:
    """The graph before fusion."""
    model = MODELS[name]()
    run_pipeline(model, at_fusion(PIPELINES[preset])[0])
    return model


def parts_of(model: ir.Model, ranks: int = RANKS, preset: str = "none") -> list[ir.Model]:
    return run_ranks(model, at_fusion(PIPELINES[preset])[1], ranks)[0]


def logits(models: list[ir.Model]) -> npt.NDArray[np.float32]:
    """Of a prompt of 18 tokens; ranks beside each other."""
    options = [attributes_of(node) for model in models for node in model.graph if node.op_type == "Attention"][::2]
    caches = [PagedCache(2, option["num_kv_heads"], HEAD_DIM, num_blocks=2) for option in options]
    ids = np.random.default_rng(3).integers(0, VOCABULARY, 18)
    given = {"token_ids": ids, "positions": np.arange(18), "sequences": ids * 0, "logit_rows": np.arange(18)}
    inputs = {name: array.astype(np.int32) for name, array in (given | {"block_table": np.array([[1, 0]])}).items()}
    return np.concatenate([outputs["logits"] for outputs in evaluate_ranks(models, inputs, caches)], axis=1)


@pytest.mark.parametrize("name", ["llama", "bloom"])
@pytest.mark.parametrize("preset", ["none", "int8"])
def test_text(golden: Callable[[str, str], None], name: str, preset: str) -> None:
    model = {"llama": llama, "bloom": bloom}[name](layers=1, last_norm=True)
    run_pipeline(model, at_fusion(PIPELINES[preset])[0])
    before, step = model.clone(), PartitionTensors(1, 2)
    assert step.run(model).changes
    verify(model)
    text = to_text(model)
    assert step.run(model) == PassResult() and to_text(model) == text, "a second run changes nothing"
    golden(f"partition-tensors-{preset}-{name}", side_by_side(before, step, model))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("preset", "rtol"), [("none", 2e-6), ("int8-accurate", 2e-4), ("int8", 0.03), ("int8-plain", 0.03)])
def test_results(name: str, preset: str, rtol: float) -> None:
    one, several = MODELS[name](), parts_of(quantized(name, preset), preset=preset)
    run_pipeline(one, PIPELINES[preset])
    expected = logits([one])
    np.testing.assert_allclose(logits(several), expected, rtol=0, atol=rtol * np.abs(expected).max())


@pytest.mark.parametrize("name", MODELS)
def test_groups_stay_whole(name: str) -> None:
    """Group scales and zero points are divided like the inputs that they belong to."""
    model = MODELS[name]()
    QuantizeGroups(weights=WeightScheme(4, 16)).run(model)
    for node in [node for node in model.graph if node.op_type == "GroupQuantizedLinear"]:
        scales = operand(node, Role.GROUP_SCALE)
        assert scales is not None and scales.shape is not None
        zeros = np.random.default_rng(1).integers(-1, 2, scales.shape.numpy()).astype(np.int8)
        value = make_initializer(ir.Tensor(zeros, name=f"{node.name}.zeros"))
        model.graph.register_initializer(value)
        node.resize_inputs(6)
        node.replace_input_with(5, value)
    verify(model)
    expected, several = logits([model]), parts_of(model)
    np.testing.assert_allclose(logits(several), expected, rtol=0, atol=0.03 * np.abs(expected).max())
    shapes = {str(TensorSpec.of(value)) for rank in several for node in rank.graph if (value := operand(node, Role.ZERO_POINT))}
    assert "int8[32, 1]" in shapes, "half of the two groups of 16 inputs"


def test_groups_that_do_not_fit_the_ranks() -> None:
    model = MODELS["bloom"]()
    QuantizeGroups(weights=WeightScheme(4, 20)).run(model)
    with pytest.raises(CompileError, match=r"key/value heads for 2 ranks: found 4, in units of 5, expected 2"):
        PartitionTensors(0, 2).run(model)


@pytest.mark.parametrize("name", MODELS)
def test_sums_are_fused_into_the_norms_behind_them(name: str) -> None:
    one = MODELS[name]()
    run_pipeline(one, PIPELINES["int8"])
    for model in parts_of(quantized(name, "int8"), preset="int8"):
        fused = [node for node in model.graph if node.op_type in ("AddNorm", "AddNormQuantize")]
        assert len(fused) == sum(count(one, op) for op in ("AddNorm", "AddNormQuantize"))
        sums = {node.outputs[0] for node in model.graph if node.op_type == "AllReduce"}
        assert all(sums & set(node.inputs[:2]) for node in fused)
        assert count(model, "AllReduce") == 1 + 2 * 2  # the embedding, then two in each layer


def arrays(model: ir.Model) -> dict[str, npt.NDArray[Any]]:
    return {name: value.const_value.numpy() for name, value in model.graph.initializers.items() if value.const_value}


@pytest.mark.parametrize(("name", "ranks"), [("llama", 2), ("bloom", 2), ("bloom", 3), ("bloom-residual", 3)])
def test_ranks_together_have_the_integers_and_scales_of_one(name: str, ranks: int) -> None:
    model = quantized(name, "int8-plain")
    whole = arrays(model)
    graphs = [model.clone() for _ in range(ranks)]
    for rank, graph in enumerate(graphs):
        PartitionTensors(rank, ranks).run(graph)
    parts = [arrays(graph) for graph in graphs]
    for weight, expected in whole.items():
        found = [part[weight] for part in parts]
        if weight.endswith("sizes"):
            np.testing.assert_array_equal(sum(found), expected)
        elif ".qkv." in weight:  # all q, all k, all v on every rank
            split = [np.split(array, 3) for array in found]
            np.testing.assert_array_equal(
                np.concatenate([kind for part in zip(*split, strict=True) for kind in part]), expected
            )
        elif weight.endswith((".dense.bias", ".down.bias")):
            np.testing.assert_array_equal(found[0], expected)
            assert not any(array.any() for array in found[1:])
        elif found[0].shape == expected.shape:  # norms, tables, scales of what is summed
            assert all(np.array_equal(array, expected) for array in found)
        else:
            axis = int(found[0].shape[0] == expected.shape[0])
            np.testing.assert_array_equal(np.concatenate(found, axis), expected)
    assert count(graphs[0], "IntegerLinear") == count(model, "IntegerLinear") > 0


def test_a_tied_table_is_one_tensor_on_every_rank() -> None:
    for model in parts_of(MODELS["bloom"]()):
        readers = [node.op_type for node in model.graph.initializers["embed.weight"].consumers()]
        assert sorted(readers) == ["Embedding", "Gemm"]


def test_whole_weights_are_read_once_for_all_ranks() -> None:
    reads = []

    def read() -> npt.NDArray[np.float32]:
        reads.append(1)
        return np.ones((VOCABULARY, 32), np.float32)

    model = MODELS["bloom"]()
    model.graph.initializers["embed.weight"].const_value = lazy("embed.weight", read, (VOCABULARY, 32), ir.DataType.FLOAT)
    tables = [rank.graph.initializers["embed.weight"].const_value for rank in parts_of(model)]
    assert not reads, "nothing is read while compiling"
    with wholes_kept():
        assert [table.numpy().shape for table in tables if table] == [(32, 32), (8, 32)]
    assert len(reads) == 1


def test_one_rank_is_left_alone() -> None:
    _, result = check_pass(PartitionTensors(0, 1), MODELS["llama"]())
    assert result == PassResult()
    with pytest.raises(CompileError, match=r"^partition: option rank: found 2, expected 0 to 1\.$"):
        PartitionTensors(2, 2)


def test_what_cannot_be_divided() -> None:
    with pytest.raises(CompileError, match=r"key/value heads for 3 ranks: found 2 of 2 query heads each"):
        PartitionTensors(0, 3).run(MODELS["llama"]())
    with pytest.raises(
        CompileError, match=r"channels of h\.0\.mlp\.gelu for 4 ranks: found 48, in units of 16, expected 4 units"
    ):
        PartitionTensors(0, 4).run(MODELS["bloom"]())
    with pytest.raises(CompileError, match=r"expected 4 units or more; build for at most 3 ranks\.$"):
        PartitionTensors(0, 4).run(quantized("bloom", "int8"))
    b = Tiny()
    inner = b.op("SwiGLU", b.linear(b.x, "gate", 64), b.linear(b.x, "up", 64), name="act")
    rotated = b.head(b.linear(inner, "down", 32))
    RotateActivations().run(rotated)
    remedy = r"build for one rank, or from the checkpoint for these, with smaller blocks of its rotation\.$"
    with pytest.raises(CompileError, match=remedy):
        PartitionTensors(0, 4).run(rotated)


def test_graphs_that_it_does_not_know() -> None:
    b = Tiny()
    q = b.linear(b.x, "q", 32)
    doubled = b.op("Add", q, q, name="double")
    x = b.linear(b.attention(doubled, q, q, "attn", 0), "o", 32)
    with pytest.raises(
        CompileError, match=r"^partition: parts of double \(node double\): found Add, expected linears, attention"
    ):
        PartitionTensors(0, 2).run(b.head(x))
    b = Tiny()
    q, k, v = b.split(b.linear(b.x, "qkv", 128), [32, 32, 64], "split")
    x = b.attention(q, k, b.linear(v, "v", 32), "attn", 0)
    with pytest.raises(CompileError, match=r"^partition: part split\.2 \(node split\): found other readers, expected queries"):
        PartitionTensors(0, 2).run(b.head(x))


def test_parity_rejects_a_bias_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """A deliberately broken rewrite: what is added behind a sum would be added once a rank."""
    monkeypatch.setattr(RankGraph, "_zeros", lambda self, bias: bias)
    expected = logits([MODELS["bloom"]()])
    found = logits(parts_of(MODELS["bloom"]()))
    assert np.abs(found - expected).max() > 0.1 * np.abs(expected).max()
