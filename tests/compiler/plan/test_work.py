"""Outlines of checkpoints, and what their ranks hold and do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from belle_compile.compiler import targets
from belle_compile.compiler.backends.tvm.lower import lower
from belle_compile.compiler.checkpoint import Checkpoint, open_checkpoint
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.families import build_graph
from belle_compile.compiler.plan.outline import outline
from belle_compile.compiler.plan.work import RankPlan, RankWork, plans_of
from belle_compile.passes.pipeline import passes_of, run_pipeline
from belle_compile.passes.presets import PRESETS
from tests.parity.variants import VARIANTS

BELLE_7B: dict[str, Any] = {"model_type": "bloom", "vocab_size": 250880, "hidden_size": 4096, "n_layer": 30, "n_head": 32}
BLOOM_176B = BELLE_7B | {"hidden_size": 14336, "n_layer": 70, "n_head": 112}
EXT_7B: dict[str, Any] = {"model_type": "llama", "vocab_size": 79458, "hidden_size": 4096, "intermediate_size": 11008,
                          "num_hidden_layers": 2, "num_attention_heads": 32, "rms_norm_eps": 1e-6}  # fmt: skip


def plans(checkpoint: Checkpoint, preset: str, ranks: int = 1) -> list[RankPlan]:
    target, backend = targets.choose(f"cpux{ranks}")
    return plans_of(build_graph(checkpoint), PRESETS[preset].recipe, backend, target)


def works(checkpoint: Checkpoint, preset: str, ranks: int = 1) -> list[RankWork]:
    return [plan.work for plan in plans(checkpoint, preset, ranks) if plan.work]


def written(config: dict[str, Any], folder: Path) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("variant", ["bloom", "llama_gqa"])
@pytest.mark.parametrize("quantization", ["int8", "int4", "none"])
def test_dimensions_alone_give_the_work_of_the_checkpoint(variant: str, quantization: str, tmp_path: Path) -> None:
    checkpoint, ranks = VARIANTS[variant](tmp_path / variant), 2 if quantization == "none" else 1
    found = plans(outline(checkpoint / "config.json"), quantization, ranks)
    assert found == plans(outline(checkpoint), quantization, ranks) and len(found) == ranks


def test_one_rank_is_what_a_build_would_compile(tmp_path: Path) -> None:
    checkpoint = VARIANTS["llama_gqa"](tmp_path / "llama")
    graph = build_graph(open_checkpoint(checkpoint))
    run_pipeline(graph, passes_of(PRESETS["int8"].recipe))
    program, packed, *_ = lower(graph, 0)
    (plan,) = plans(outline(checkpoint), "int8")
    footprint, work = plan.footprint, plan.work
    assert work is not None and (work.calls, work.sums, work.kv) == (len(program.calls), (), footprint.kv)
    assert (footprint.activations, footprint.kv.block_bytes) == (program.arena_bytes, program.kv.block_bytes)
    assert footprint.weights == sum(weight.bytes for weight in packed)
    assert sum(not product.of_tokens for product in work.products) == 1, "the head"


def test_belle_7b_on_four_ranks(tmp_path: Path) -> None:
    """A quarter of everything that counts, and two sums a layer and one behind the embedding."""
    path = written(BELLE_7B, tmp_path)
    (one,), ranks = plans(outline(path), "int8"), plans(outline(path), "int8", 4)
    whole = one.work
    assert one.footprint.weights == pytest.approx(8.11e9, rel=0.01) and whole is not None
    for plan in ranks:
        work = plan.work
        assert work is not None and plan.footprint.weights == pytest.approx(one.footprint.weights / 4, rel=0.002)
        assert work.kv.bytes(2048) == whole.kv.bytes(2048) / 4
        assert work.sums == (4096,) * 61
        assert sum(product.operations for product in work.products) == sum(p.operations for p in whole.products) / 4


def test_bloom_176b_is_weighed_without_a_weight(tmp_path: Path) -> None:
    first = plans(outline(written(BLOOM_176B, tmp_path)), "int8", 8)[0]
    assert first.work is not None and 22e9 < first.footprint.weights < 23e9 and len(first.work.sums) == 141


def test_an_uneven_vocabulary(tmp_path: Path) -> None:
    heads = [work.products[-1].weight_bytes for work in works(outline(written(EXT_7B, tmp_path)), "int8", 4)]
    assert sum(heads) == 79458 * 4096 and len(set(heads)) > 1


def test_16_bit_activations_are_multiplied_twice(tmp_path: Path) -> None:
    path = written(EXT_7B, tmp_path)
    (narrow,), (wide,) = (works(outline(path), name) for name in ("int8", "int8-accurate"))
    assert [p.weight_bytes for p in wide.products] == [p.weight_bytes for p in narrow.products]
    assert [p.operations for p in wide.products] == [2 * p.operations for p in narrow.products]


def test_what_has_no_outline(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match=r"missing\.json: found No such file or directory, expected a config\.json"):
        outline(tmp_path / "missing.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(CompileError, match=r"broken\.json is not JSON"):
        outline(tmp_path / "broken.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(CompileError, match=r"list\.json: found no object"):
        outline(tmp_path / "list.json")
    with pytest.raises(CompileError, match=r"values of word_embeddings\.weight: found only dimensions"):
        outline(written(BELLE_7B, tmp_path)).tensor("word_embeddings.weight", (250880, 4096)).read()
