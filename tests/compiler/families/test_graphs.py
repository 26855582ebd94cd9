"""The graphs as text, their weights, and which tensors they take."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.bloom.modeling_bloom import _get_alibi_slopes

from belle_compile.compiler.checkpoint import open_checkpoint
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.families import bloom, build_graph
from belle_compile.compiler.families.layers import Layers
from belle_compile.compiler.families.registry import REGISTRY
from belle_compile.compiler.ir.build import GraphBuilder
from belle_compile.compiler.ir.lazy import read_rows
from belle_compile.compiler.ir.text import to_text
from tests.compiler.families.helpers import fake_checkpoint, rewrite_config, rewrite_tensors
from tests.parity.stepping import Stepper, relative_error
from tests.parity.variants import VARIANTS, hf_logits, random_ids

Golden = Callable[[str, str], None]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """An untied LLaMA."""
    return VARIANTS["llama"](tmp_path)


@pytest.mark.parametrize("name", ["bloom", "llama_gqa"])
def test_graph_text(name: str, tmp_path: Path, golden: Golden) -> None:
    golden(f"family_{name}", to_text(build_graph(open_checkpoint(VARIANTS[name](tmp_path)))))


@pytest.mark.parametrize("family", REGISTRY)
def test_every_family_has_a_parity_variant_of_its_name(family: str) -> None:
    assert family in VARIANTS


@pytest.mark.parametrize("num_heads", [1, 2, 3, 5, 6, 7, 12, 16, 20, 32, 40, 71, 112])
def test_alibi_slopes_are_those_of_transformers(num_heads: int) -> None:
    expected = _get_alibi_slopes(num_heads, torch.device("cpu")).numpy()
    np.testing.assert_allclose(bloom.alibi_slopes(num_heads), expected, rtol=3e-7)


def test_query_key_value_rows_are_ungrouped_and_stay_lazy() -> None:
    heads, head_dim, hidden = 3, 2, 6
    shapes = {"qkv.weight": (18, hidden), "qkv.bias": (18,)}
    layers = Layers(fake_checkpoint("bloom", {}, shapes), GraphBuilder())
    order = bloom.order_of_parts(heads, head_dim)
    values = {name: layers.weight(name, shape, order).const_value for name, shape in shapes.items()}
    weight, bias = (tensor.numpy() for tensor in values.values() if tensor is not None)
    rows = [0, 1, 6, 7, 12, 13, 2, 3, 8, 9, 14, 15, 4, 5, 10, 11, 16, 17]
    assert weight[:, 0].tolist() == [row * hidden for row in rows] and weight.dtype == np.float32
    assert bias.tolist() == rows


def test_building_reads_no_weights_and_reading_keeps_none(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(VARIANTS["bloom_untied"](tmp_path))
    reads: list[str] = []
    for name, tensor in checkpoint.tensors.items():
        load = tensor.load
        object.__setattr__(tensor, "load", lambda start, stop, n=name, f=load: (reads.append(n), f(start, stop))[1])
    model = build_graph(checkpoint)
    assert not reads
    table = model.graph.initializers["word_embeddings.weight"].const_value
    assert table is not None
    for _ in range(2):
        table.numpy()
    gc.collect()
    assert reads == ["word_embeddings.weight"] * 2


def test_old_releases_of_yi_are_llamas(directory: Path) -> None:
    """Their norms are called ln1 and ln2."""
    expected = hf_logits(directory, range(9))

    def rename(tensors: dict[str, Any]) -> None:
        for name in list(tensors):
            stored = name.replace("input_layernorm", "ln1").replace("post_attention_layernorm", "ln2")
            tensors[stored] = tensors.pop(name)

    rewrite_config(rewrite_tensors(directory, rename), model_type="Yi", architectures=["YiForCausalLM"])
    checkpoint = open_checkpoint(directory)
    assert checkpoint.family == "llama"
    assert relative_error(Stepper(build_graph(checkpoint)).step({0: range(9)})[0], expected) < 1e-5


def test_packed_rows_are_read_alone(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(VARIANTS["internlm2"](tmp_path))
    model, packed = build_graph(checkpoint), checkpoint.tensors["model.layers.0.self_attn.wqkv.weight"].read()
    k, v = (model.graph.initializers[f"model.layers.0.self_attn.{part}_proj.weight"].const_value for part in "kv")
    assert k is not None and v is not None
    grouped = packed.reshape(2, 4, 16, 64)
    np.testing.assert_array_equal(v.numpy(), grouped[:, 3].reshape(32, 64))
    np.testing.assert_array_equal(read_rows(k, 10, 20), grouped[:, 2].reshape(32, 64)[10:20])


def test_tied_head_shares_the_embedding(tmp_path: Path) -> None:
    model = build_graph(open_checkpoint(VARIANTS["bloom"](tmp_path)))
    assert "lm_head.weight" not in model.graph.initializers
    assert [node.op_type for node in model.graph.initializers["word_embeddings.weight"].consumers()] == ["Gather", "Gemm"]


def _parity(directory: Path) -> float:
    ids = random_ids(directory, 9)
    return relative_error(Stepper(build_graph(open_checkpoint(directory))).step({0: ids})[0], hf_logits(directory, ids))


def test_tied_head_that_is_also_in_the_file_is_accepted_when_identical(tmp_path: Path) -> None:
    def add_head(tensors: dict[str, Any]) -> None:
        tensors["lm_head.weight"] = tensors["transformer.word_embeddings.weight"].copy()

    assert _parity(rewrite_tensors(VARIANTS["bloom"](tmp_path), add_head)) < 1e-5


def test_tied_head_in_the_place_of_the_embedding_is_used(tmp_path: Path) -> None:
    def move(tensors: dict[str, Any]) -> None:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    assert _parity(rewrite_tensors(VARIANTS["llama_tied"](tmp_path), move)) < 1e-5


def test_tied_head_that_differs_from_the_embedding_is_refused(tmp_path: Path) -> None:
    def add_head(tensors: dict[str, Any]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["lm_head.weight"][-1, -1] += 1

    directory = rewrite_tensors(VARIANTS["llama_tied"](tmp_path), add_head)
    with pytest.raises(
        CompileError, match=r"lm_head.weight of .*: found other values than in .*set tie_word_embeddings to false"
    ):
        build_graph(open_checkpoint(directory))


def test_untied_head_that_is_missing_is_refused(directory: Path) -> None:
    rewrite_tensors(directory, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(CompileError, match=r"found no such tensor.*set tie_word_embeddings to true"):
        build_graph(open_checkpoint(directory))


def test_missing_tensor_is_named(directory: Path) -> None:
    rewrite_tensors(directory, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CompileError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        build_graph(open_checkpoint(directory))


def test_wrong_shape_names_tensor_and_both_shapes(directory: Path) -> None:
    with pytest.raises(CompileError, match=r"gate_proj.*found shape \[104, 64\], expected shape \[96, 64\]"):
        build_graph(open_checkpoint(rewrite_config(directory, intermediate_size=96)))


def test_tensors_that_nothing_uses_are_named(directory: Path) -> None:
    with pytest.raises(
        CompileError, match=r"found model\.layers\.1\.input_layernorm\.weight, .* and 5 more, which the graph does"
    ):
        build_graph(open_checkpoint(rewrite_config(directory, num_hidden_layers=1)))


def test_buffers_of_old_releases_are_ignored(directory: Path) -> None:
    def add_buffers(tensors: dict[str, Any]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
        tensors["h.0.attn.bias"] = np.ones((4, 4), np.float32)
        tensors["h.0.attention.masked_bias"] = np.ones(1, np.float32)

    build_graph(open_checkpoint(rewrite_tensors(directory, add_buffers)))
