"""Building, printing, saving and evaluating graphs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.ir.build import GraphBuilder
from belle_compile.compiler.ir.evaluate import PagedCache, evaluate, evaluate_ranks
from belle_compile.compiler.ir.text import save_onnx, to_text
from belle_compile.compiler.ir.verify import verify


def small() -> ir.Model:
    """One layer with scopes, a split, grouped-query attention with RoPE and a tied head."""
    b = GraphBuilder("small")
    random = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> ir.Value:
        return b.weight(name, random.standard_normal(shape).astype(np.float32))

    table = weight("table", 10, 8)
    step = b.inputs
    x = b.op("Gather", table, step.token_ids, name="embed")
    cos_sin = b.op("RotaryTable", step.positions, step.sequences, weight("inv_freq", 2), name="rotary")
    with b.scope("h.0"):
        n = b.op("RMSNormalization", x, weight("h.0.norm.weight", 8), name="norm", epsilon=1e-6)
        with b.scope("attn"):
            q, k, v = b.split(b.op("Gemm", n, weight("h.0.attn.qkv.weight", 16, 8), name="qkv", transB=1), [8, 4, 4], "split")
            a = b.op(
                "Attention", q, k, v, step.positions, step.sequences, step.block_table, cos_sin,
                name="attend", layer=0, num_heads=2, num_kv_heads=1, head_dim=4, scale=0.5,
            )  # fmt: skip
        x = b.op("Add", x, a, name="add")
    rows = b.op("Gather", x, step.logit_rows, name="rows")
    return b.finish(b.op("Gemm", rows, table, name="head", transB=1), {"num_layers": "1", "family": "llama"})


def inputs(tokens: list[int], start: int = 0) -> dict[str, np.ndarray]:
    count = len(tokens)
    arrays = {
        "token_ids": tokens,
        "positions": range(start, start + count),
        "sequences": [0] * count,
        "block_table": [[1, 0]],
        "logit_rows": range(count),
    }
    return {name: np.array(array, np.int32) for name, array in arrays.items()}


def test_text(golden: Callable[[str, str], None]) -> None:
    model = small()
    golden("ir-small", to_text(model))
    assert to_text(model) == to_text(model.clone()) == to_text(small())


def test_onnx_without_weights(tmp_path: Path) -> None:
    model = small()
    before = to_text(model)
    save_onnx(model, tmp_path / "small.onnx")
    assert to_text(model) == before
    proto = onnx.load(str(tmp_path / "small.onnx"), load_external_data=False)
    assert all(not tensor.raw_data for tensor in proto.graph.initializer if tensor.data_type != onnx.TensorProto.INT64)
    loaded = ir.from_proto(proto)
    verify(loaded)
    assert [line.split(" {")[0] for line in to_text(loaded).splitlines()] == [
        line.split(" {")[0] for line in before.splitlines()
    ]


def test_whole_model_as_onnx(tmp_path: Path) -> None:
    model = small()
    ir.save(model, tmp_path / "small.onnx", external_data="small.data")
    results = [
        evaluate(each, inputs([1, 2, 3]), PagedCache(1, 1, 4, 2))["logits"]
        for each in (model, ir.load(tmp_path / "small.onnx"))
    ]
    np.testing.assert_allclose(results[0], results[1], rtol=1e-6)  # epsilon and scale become float32


def test_prompt_at_once_is_prompt_token_by_token() -> None:
    model, tokens = small(), [1, 2, 3, 9, 0, 4] * 4  # 24 tokens: two blocks
    whole = evaluate(model, inputs(tokens), PagedCache(1, 1, 4, 2))["logits"]
    cache = PagedCache(1, 1, 4, 2)
    single = [evaluate(model, inputs([token], at), cache)["logits"][0] for at, token in enumerate(tokens)]
    np.testing.assert_allclose(np.stack(single), whole, rtol=0, atol=1e-5)
    assert whole.shape == (24, 10) and whole.dtype == np.float32


def test_other_values_on_request() -> None:
    found = evaluate(small(), inputs([1, 2]), PagedCache(1, 1, 4, 2), also=["h.0.attn.qkv", "token_ids"])
    assert {name: array.shape for name, array in found.items()} == {
        "logits": (2, 10),
        "h.0.attn.qkv": (2, 16),
        "token_ids": (2,),
    }
    with pytest.raises(CompileError, match=r"values asked for: found h.1, expected names of the graph"):
        evaluate(small(), inputs([1, 2]), PagedCache(1, 1, 4, 2), also=["h.1"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": None}, r"input positions: found nothing, expected int32\[T\]"),
        ({"positions": np.zeros(3, np.int32)}, r"input positions: found int32\[3\], expected int32\[T\] with T = 2"),
        ({"positions": np.zeros(2, np.int64)}, r"input positions: found int64\[2\]"),
        ({"block_table": np.zeros(2, np.int32)}, r"input block_table: found int32\[2\], expected int32\[B, MB\]"),
    ],
)
def test_inputs_that_do_not_fit(change: dict[str, np.ndarray | None], message: str) -> None:
    given = {name: array for name, array in (inputs([1, 2]) | change).items() if array is not None}
    with pytest.raises(CompileError, match=message):
        evaluate(small(), given, PagedCache(1, 1, 4, 2))


def test_names_are_unique() -> None:
    b = GraphBuilder()
    table = b.weight("table", np.ones((10, 8), np.float32))
    assert b.weight("table", np.zeros((1, 1), np.float32)) is table  # tied weights: the first stays
    b.op("Gather", table, b.inputs.token_ids, name="embed")
    with pytest.raises(CompileError, match=r"build: value embed: found a second value of that name"):
        b.op("Gather", table, b.inputs.token_ids, name="embed")
    with pytest.raises(CompileError, match=r"build: op Conv \(node conv\)"):
        b.op("Conv", table, name="conv")


def summing(rank: int, ranks: int = 2, name: str = "total") -> ir.Model:
    """A rank with half of the tokens and a linear of its own."""
    b = GraphBuilder("rank")
    table, first = b.weight("table", np.full((5, 4), 1.0 + rank, np.float32)), b.weight("first", np.array([5 * rank], np.int32))
    x = b.op("AllReduce", b.op("Embedding", b.inputs.token_ids, table, first, name="embed"), name=name)
    rows = b.op("Gather", x, b.inputs.logit_rows, name="rows")
    logits = b.op("Gemm", rows, b.weight("head.weight", np.full((3, 4), rank, np.float32)), name="head", transB=1)
    logits.name = "logits"
    b.graph.outputs.append(logits)
    facts = {"rank": str(rank), "ranks": str(ranks)}
    model = ir.Model(b.graph, ir_version=11, metadata_props=facts)
    verify(model)
    return model


def test_ranks_side_by_side() -> None:
    caches = [PagedCache(1, 1, 4, 2) for _ in range(2)]
    found = evaluate_ranks([summing(0), summing(1)], inputs([4, 5, 9]), caches, also=["total"])
    for outputs in found:
        np.testing.assert_array_equal(outputs["total"], np.repeat([[1], [2], [2]], 4, axis=1))
    assert [outputs["logits"].tolist() for outputs in found] == [[[0] * 3] * 3, [[4] * 3, [8] * 3, [8] * 3]]


def test_a_rank_alone_or_with_others_that_sum_elsewhere() -> None:
    with pytest.raises(
        CompileError, match=r"AllReduce \(node total\): found one rank; evaluate the graphs of all ranks together"
    ):
        evaluate(summing(0), inputs([4]), PagedCache(1, 1, 4, 2))
    caches = [PagedCache(1, 1, 4, 2) for _ in range(2)]
    with pytest.raises(CompileError, match=r"sums over ranks: found other, total, expected the same ones in the same order"):
        evaluate_ranks([summing(0), summing(1, name="other")], inputs([4]), caches)
    with pytest.raises(CompileError, match=r"sums over ranks: found total and the end"):
        evaluate_ranks([summing(0), small()], inputs([4]), caches)


def test_sums_that_do_not_verify() -> None:
    model = summing(0)
    model.metadata_props["rank"] = "2"
    with pytest.raises(CompileError, match=r"rank of the metadata: found 2 of 2, expected a rank below their number"):
        verify(model)
    model.metadata_props.clear()
    with pytest.raises(CompileError, match=r"AllReduce \(node total\): found one rank, expected ranks in the metadata"):
        verify(model)
    model = summing(0)
    model.graph.node("rows").replace_input_with(0, model.graph.node("embed").outputs[0])
    with pytest.raises(CompileError, match=r"\(node total\): found embed, which is read elsewhere or not computed"):
        verify(model)
