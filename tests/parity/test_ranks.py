"""Graphs of several ranks, evaluated side by side, against one rank: every variant, whose sizes are mostly uneven."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from transformers import Qwen3Config, Qwen3ForCausalLM

from belle_compile.compiler.checkpoint import open_checkpoint
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.families import build_graph
from belle_compile.passes.pipeline import at_fusion, run_pipeline, run_ranks
from tests.parity.engines import Builder
from tests.parity.stepping import RankStepper, Stepper, relative_error
from tests.parity.variants import VARIANTS, make_bloom, make_llama, make_relative, random_ids
from tests.pipelines import PIPELINES

TOLERANCE = 1e-5  # of the largest logit: sums in another order
PROMPT = 18  # tokens: more than a block

# Variants and numbers of ranks that do not fit, and why not
REFUSED = {
    ("bloom_3_heads", 4): "key/value heads for 4 ranks: found 3 of 1 query heads each, expected a divisor of the ranks",
    ("bloom_untied", 4): "key/value heads for 4 ranks: found 3 of 1 query heads each",
    ("llama_gqa", 3): "key/value heads for 3 ranks: found 2 of 3 query heads each, .*; build for 2 ranks",
    ("llama_head_dim", 3): "key/value heads for 3 ranks: found 2 of 2 query heads each",
    ("llama_theta", 3): "key/value heads for 3 ranks: found 2 of 2 query heads each",
    ("llama_yarn", 3): "key/value heads for 3 ranks: found 2 of 2 query heads each",
    ("qwen2", 3): "key/value heads for 3 ranks: found 2 of 2 query heads each",
    ("internlm2", 3): "key/value heads for 3 ranks: found 2 of 2 query heads each",
    ("qwen3", 3): "key/value heads for 3 ranks: found 2 of 3 query heads each",
    ("llama3_rope", 3): "key/value heads for 3 ranks: found 2 of 2 query heads each",
}


def graphs(checkpoint: Path, preset: str, ranks: int) -> tuple[ir.Model, list[ir.Model]]:
    """The graph of one rank, and those of several."""
    one, whole = (build_graph(open_checkpoint(checkpoint)) for _ in range(2))
    before, fusions = at_fusion(PIPELINES[preset])
    run_pipeline(one, PIPELINES[preset])
    run_pipeline(whole, before)
    return one, run_ranks(whole, fusions, ranks)[0]


def error(checkpoint: Path, one: ir.Model, ranks: list[ir.Model]) -> float:
    """Of the logits after a prompt and after single tokens."""
    ids = random_ids(checkpoint, PROMPT + 2)
    steps = [ids[:PROMPT], ids[PROMPT : PROMPT + 1], ids[PROMPT + 1 :]]
    found, expected = (
        np.concatenate([stepper.step({0: step})[0] for step in steps]) for stepper in (RankStepper(ranks), Stepper(one))
    )
    return relative_error(found, expected)


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_unquantized_logits_are_those_of_one_rank(builder: Builder, variant: str, ranks: int) -> None:
    checkpoint = builder.checkpoint(variant)
    if (variant, ranks) in REFUSED:
        with pytest.raises(CompileError, match=REFUSED[variant, ranks]):
            graphs(checkpoint, "none", ranks)
        return
    assert error(checkpoint, *graphs(checkpoint, "none", ranks)) < TOLERANCE


@cache
def larger(root: Path, family: str) -> Path:
    """Checkpoints with room for blocks of a rotation and groups of INT4 weights on every rank, each of uneven shares."""
    make, sizes = {
        "bloom": (make_bloom, {"hidden_size": 160, "n_head": 5, "n_layer": 1}),
        "llama": (
            make_llama,
            {"hidden_size": 72, "intermediate_size": 400, "num_attention_heads": 6, "num_key_value_heads": 3,
             "head_dim": 128, "num_hidden_layers": 1, "attention_bias": True, "mlp_bias": True},
        ),
        "qwen3": (
            partial(make_relative, Qwen3ForCausalLM, Qwen3Config, name="qwen3"),
            {"hidden_size": 72, "intermediate_size": 400, "num_attention_heads": 6, "num_key_value_heads": 3,
             "head_dim": 128, "num_hidden_layers": 1},
        ),
    }[family]  # fmt: skip
    return make(root / f"larger-{family}", **sizes)


# Activations of 8 bits round otherwise by what a rank has of them
QUANTIZED = {"int8": 0.03, "int8-plain": 0.03, "int8-accurate": 2e-4, "int4": 0.03}
INT4_BLOOM = "key/value heads for 3 ranks: found 5, in units of 4, expected 3 units or more; build for at most 2 ranks"


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("preset", QUANTIZED)
@pytest.mark.parametrize("family", ["bloom", "llama", "qwen3"])
def test_quantized_logits_are_nearly_those_of_one_rank(builder: Builder, family: str, preset: str, ranks: int) -> None:
    checkpoint = larger(builder.root, family)
    if (family, preset, ranks) == ("bloom", "int4", 3):
        with pytest.raises(CompileError, match=INT4_BLOOM):
            graphs(checkpoint, preset, ranks)
        return
    assert error(checkpoint, *graphs(checkpoint, preset, ranks)) < QUANTIZED[preset]
