"""Rotary frequencies against Transformers' own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.families.rope import read_rope

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "theta": {"rope_theta": 500000.0},
    "default, new key": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "linear, old type": {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 10000},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.5}},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "llama3": {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 8192}, "rope_theta": 500000.0},
    "llama3, new key": {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 1024, "rope_theta": 10000.0}},
    "llama3, length outside": {"rope_scaling": LLAMA3, "original_max_position_embeddings": 4096},
    "llama3, no length": {"rope_scaling": LLAMA3, "rope_theta": 500000.0},
    "yarn of Qwen2.5": {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
                        "rope_theta": 1e6, "max_position_embeddings": 32768},
    "yarn of Qwen3": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
                      "rope_theta": 1e6, "max_position_embeddings": 40960},
    "yarn of Llama 2": {"rope_scaling": {"type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096,
                                         "finetuned": True}, "max_position_embeddings": 65536},
    "yarn, new key": {"rope_parameters": {"rope_type": "yarn", "factor": 2.5, "rope_theta": 5e4}},
    "yarn, length outside": {"rope_scaling": {**YARN, "factor": 8}, "original_max_position_embeddings": 512},
    "yarn, attention": {"rope_scaling": {**YARN, "attention_factor": 0.7}},
    "yarn, scales": {"rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 1.5}},
    "yarn, one scale": {"rope_scaling": {**YARN, "mscale": 0.707}},
    "yarn, betas": {"rope_scaling": {**YARN, "beta_fast": 16, "beta_slow": 2.5}},
    "yarn, not truncated": {"rope_scaling": {**YARN, "truncate": False}},
    "yarn, factor 1": {"rope_scaling": {**YARN, "factor": 1.0}},
}  # fmt: skip


@pytest.mark.parametrize("head_dim", [8, 64, 128])
@pytest.mark.parametrize("name", CASES)
def test_frequencies_are_those_of_transformers(name: str, head_dim: int) -> None:
    config = {"hidden_size": 4 * head_dim, "num_attention_heads": 4, "max_position_embeddings": 16384, **CASES[name]}
    reference = LlamaRotaryEmbedding(
        LlamaConfig(**{**config, **{k: dict(v) for k, v in config.items() if isinstance(v, dict)}})
    )
    rope = read_rope(config, head_dim)
    assert rope.attention_scaling == pytest.approx(reference.attention_scaling, rel=1e-12)
    np.testing.assert_allclose(rope.inv_freq, reference.inv_freq.numpy(), rtol=5e-7)  # a few roundings


def test_dynamic_keeps_what_growing_the_base_needs() -> None:
    rope = read_rope({"rope_scaling": {"type": "dynamic", "factor": 4}, "max_position_embeddings": 1000, "rope_theta": 5e4}, 64)
    assert (rope.dynamic_factor, rope.original_max, rope.base, rope.max_position) == (4.0, 1000, 5e4, 4000)


@pytest.mark.parametrize(
    ("changes", "longest"),
    [({}, 4096), ({"max_position_embeddings": 4096}, 4096), ({"original_max_position_embeddings": 2048}, 8192)],
)
def test_the_longest_sequence_of_yarn_is_a_multiple_of_the_original_one(changes: dict[str, Any], longest: int) -> None:
    assert read_rope({"rope_scaling": YARN, "max_position_embeddings": 1024, **changes}, 64).max_position == longest


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"rope_scaling": {"rope_type": "longrope", "factor": 4.0}},
            "key rope_type of the rope parameters in config.json: found 'longrope', "
            "expected one of default, linear, dynamic, llama3, yarn",
        ),
        ({"rope_scaling": {"rope_type": "yarn"}}, "key factor of the rope parameters in config.json: found nothing"),
        ({"rope_scaling": {**YARN, "factor": 0.5}}, "found 0.5, expected a number >= 1"),
        (
            {"rope_scaling": {**YARN, "beta_fast": 1}},
            "key beta_fast of the rope parameters in config.json: found 1",
        ),
        ({"rope_scaling": {**YARN, "attention_factor": -1.0}}, "key attention_factor of the rope parameters in config.json"),
        (
            {"rope_scaling": {**YARN, "truncate": 1}},
            "key truncate of the rope parameters in config.json: found 1",
        ),
        ({"rope_scaling": YARN, "rope_theta": 1.0}, "key rope_theta of config.json: found 1, expected a number > 1"),
        ({"rope_scaling": {**YARN, "attn_factor": 1.2}}, "key attn_factor"),
        ({"rope_scaling": {**YARN, "original_max_position_embeddings": 0}}, "key original_max_position_embeddings"),
        ({"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic', type 'linear'"),
        ({"rope_scaling": {"type": "linear"}}, "key factor of the rope parameters in config.json: found nothing"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "found 0.5, expected a number >= 1"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 32}}, "key beta_fast"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "attention_factor": 1.2}}, "key attention_factor"),
        ({"rope_scaling": {"type": "default", "factor": 2.0}}, "key factor"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 512}},
            "found 512, expected 2048",
        ),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "found 4, expected more than low_freq_factor, 4"),
        ({"rope_scaling": [1.0]}, "found [1.0], expected an object with rope_type"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "key full_attention"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "key partial_rotary_factor"),
        ({"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 1e4}, "found 10000.0, and 500000.0 in the rope parameters"),
        ({"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling {"),
        ({"rope_theta": float("inf")}, "key rope_theta of config.json: found inf"),
    ],
)
def test_what_is_not_built_is_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CompileError) as caught:
        read_rope(changes, 64)
    assert words in str(caught.value)
