"""Graphs in segments over many sequences: the logits are those of the evaluator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.ir import stream
from belle_compile.compiler.ir.cache import PagedCache
from belle_compile.compiler.ir.evaluate import evaluate
from belle_compile.compiler.ir.segments import Segment, cut, cut_by_inputs
from belle_compile.compiler.ir.stream import ActivationStream, batches, linears
from belle_compile.passes.rotation.rotate_activations import RotateActivations
from tests.passes.helpers import HEAD_DIM, VOCABULARY, bloom, llama

SEQUENCES = [np.random.default_rng(n).integers(0, VOCABULARY, n).tolist() for n in (7, 20, 1, 3, 33)]


def rotated(model: ir.Model) -> ir.Model:
    """With an online rotation."""
    assert RotateActivations().run(model).changes == 2
    return model


def windowed(model: ir.Model) -> ir.Model:
    """With a sliding window in its first layer."""
    attention = next(node for node in model.graph if node.op_type == "Attention")
    attention.attributes["window"] = ir.AttrInt64("window", 5)
    return model


MODELS: dict[str, Callable[[], ir.Model]] = {
    "llama": lambda: llama(last_norm=True),
    "bloom": lambda: bloom(last_norm=True),
    "llama, windowed": lambda: windowed(llama()),
    "bloom, windowed": lambda: windowed(bloom()),
    "llama, rotated while running": lambda: rotated(llama()),
    "bloom, residual after the norm": lambda: bloom(residual_after_norm=True),
}


def evaluated(model: ir.Model, ids: list[int]) -> np.ndarray:
    """All logits of one sequence by the NumPy meaning."""
    kv_heads = next(node for node in model.graph if node.op_type == "Attention").attributes["num_kv_heads"].as_int()
    blocks = -(-len(ids) // 16)
    rows = np.arange(len(ids), dtype=np.int32)
    inputs = {"token_ids": np.array(ids, np.int32), "positions": rows, "sequences": np.zeros_like(rows), "logit_rows": rows,
              "block_table": np.arange(blocks, dtype=np.int32)[None]}  # fmt: skip
    return evaluate(model, inputs, PagedCache(2, kv_heads, HEAD_DIM, blocks))["logits"]


@pytest.mark.parametrize("segments_of", [cut, cut_by_inputs], ids=["wide", "by inputs"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_evaluators(name: str, segments_of: Callable[[ir.Graph], list[Segment]], tmp_path: Path) -> None:
    model, found = MODELS[name](), dict[int, torch.Tensor]()
    activations = ActivationStream(model, SEQUENCES, tmp_path, batch_tokens=24, segments=segments_of(model.graph))
    assert activations.tokens == 64
    for number in range(len(activations.segments)):
        activations.forward(number, activations.load(number), on_logits=found.__setitem__)
        activations.drop(number)
    for i, ids in enumerate(SEQUENCES):
        expected = evaluated(model, ids)
        np.testing.assert_allclose(found[i].numpy(), expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "crossing"), [("llama", 2), ("bloom", 1)])
def test_segments_are_cut_where_little_crosses(name: str, crossing: int) -> None:
    model = MODELS[name]()
    segments = cut(model.graph)
    assert len(segments) == 2 * 2 + 1  # of each layer the attention and the rest, and the head
    assert [node for segment in segments for node in segment.nodes] == list(model.graph)
    assert all(len(segment.gives) <= crossing for segment in segments)
    assert [segment.takes for segment in segments[1:]] == [segment.gives for segment in segments[:-1]]
    assert [str(value.name) for value in segments[-1].gives] == ["logits"]
    assert all(any(node.op_type == "Gemm" for node in segment.nodes) for segment in segments)


@pytest.mark.parametrize("name", ["llama", "bloom", "llama, rotated while running"])
def test_linears_of_a_segment_cut_by_inputs_read_one_value(name: str) -> None:
    model = MODELS[name]()
    segments = cut_by_inputs(model.graph)
    assert len(segments) == 2 * 4 + 1  # of each layer the projections, their output, the feed-forward and its output
    assert [node for segment in segments for node in segment.nodes] == list(model.graph)
    assert all(len({node.inputs[0] for node in linears(segment)}) == 1 for segment in segments)
    # What a last linear of the feed-forward reads is computed before it: one value crosses, and the residual stream.
    assert all(len(segment.gives) - ("bloom" not in name) <= 2 for segment in segments)


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_observing_ends_before_the_linear_and_writes_nothing(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    activations = ActivationStream(model, SEQUENCES, tmp_path, batch_tokens=24, segments=cut_by_inputs(model.graph))
    first, seen, forward = next(linears(activations.segments[0])), list[torch.Tensor](), list[torch.Tensor]()
    seen += activations.observe(0, activations.load(0), first, torch.clone)
    assert len(seen) == 3 and not list(tmp_path.iterdir())
    activations.forward(0, activations.load(0), on_output=lambda node, x, y: forward.append(x) if node is first else None)
    assert all(torch.equal(one, other) for one, other in zip(seen, forward, strict=True))


def test_coarse_weights_are_those_of_linears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    activations = ActivationStream(MODELS["llama"](), SEQUENCES, tmp_path)
    weights = activations.load(0)
    monkeypatch.setattr(stream, "multiplies_bfloat16", lambda device: False)
    assert activations.coarse(0, weights) is weights
    monkeypatch.setattr(stream, "multiplies_bfloat16", lambda device: True)
    coarse = {str(value.name): tensor.dtype == torch.bfloat16 for value, tensor in activations.coarse(0, weights).items()}
    assert {name for name, rounded in coarse.items() if rounded} == {f"layers.0.attn.{part}.weight" for part in "qkvo"}
    assert len(coarse) > 4


def test_a_graph_without_attention_is_cut_too() -> None:
    model = MODELS["llama"]()
    assert sum(len(segment.nodes) for segment in cut(model.graph)) == len(list(model.graph))


def test_batches_hold_whole_sequences() -> None:
    made = batches(SEQUENCES, 24)
    assert [batch.lengths for batch in made] == [(1, 3, 7), (20,), (33,)]
    assert [batch.numbers for batch in made] == [(2, 3, 0), (1,), (4,)]
    assert made[0].positions.tolist() == [0, 0, 1, 2, 0, 1, 2, 3, 4, 5, 6]
    assert made[0].sequences.tolist() == [0, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2]


def test_a_branch_starts_at_the_seams_that_are_there(tmp_path: Path) -> None:
    """Weights doubled in one segment show from there on, in the branch alone."""
    activations = ActivationStream(llama(), SEQUENCES, tmp_path / "exact", batch_tokens=24)
    exact: dict[int, torch.Tensor] = {}
    changed: dict[int, torch.Tensor] = {}
    again: dict[int, torch.Tensor] = {}
    last = len(activations.segments) - 1
    for number in range(last + 1):
        activations.forward(number, activations.load(number), on_logits=exact.__setitem__)
    branch = activations.branch(tmp_path / "branch")
    for number in (last - 1, last):
        doubled = {value: 2 * tensor for value, tensor in branch.load(number).items()} if number < last else branch.load(number)
        branch.forward(number, doubled, on_logits=changed.__setitem__)
    activations.forward(last, activations.load(last), on_logits=again.__setitem__)
    assert all(torch.equal(exact[i], again[i]) for i in exact)
    assert not any(torch.allclose(exact[i], changed[i], atol=1e-3) for i in exact)


def test_wrong_inputs(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match="the sequences: found none, or an empty one"):
        ActivationStream(llama(), [[1], []], tmp_path)
    model = llama()
    next(node for node in model.graph if node.op_type == "SwiGLU").op_type = "AddNorm"
    with pytest.raises(CompileError, match="found op AddNorm, expected a graph of float32 ops"):
        ActivationStream(model, SEQUENCES, tmp_path)
