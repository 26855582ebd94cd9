"""LLaMA's relatives with every preset: graphs beside Transformers, engines beside graphs, and interpreted GPUs beside CPUs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from belle_compile.compiler.checkpoint import open_checkpoint
from belle_compile.compiler.driver import BuildRequest, build
from belle_compile.compiler.families import build_graph
from belle_compile.passes.pipeline import run_pipeline
from belle_compile.runtime import Engine
from tests.interpreted import InterpretedDevice, interpreted_gpu
from tests.parity.engines import Builder, EngineStepper, Floats
from tests.parity.stepping import Stepper
from tests.parity.variants import RELATIVES, hf_logits, random_ids
from tests.pipelines import PIPELINES

__all__ = ["interpreted_gpu"]

RELATED = [name for variants in RELATIVES.values() for name in variants]
# By preset: the largest error of all roundings beside Transformers, and that of those which an engine makes to the other side.
LIMITS = {"int8": (0.25, 0.05), "int8-plain": (0.25, 0.05), "int8-accurate": (0.1, 2e-3), "int4": (0.6, 0.05)}
# Between them they have all that relatives add to a LLaMA, so that no more need be compiled.
ENGINES = [("qwen3", "int8"), ("qwen3", "int8-accurate"), ("qwen3", "int4"), ("qwen2_window", "int8")]
KV_CACHE = "float32"  # so that nothing else is rounded


def error(found: Floats, expected: Floats) -> float:
    """Root of the mean square of the differences, over that of what is expected."""
    return float(np.sqrt(np.square(found - expected).mean() / np.square(expected).mean()))


def logits_of_graph(checkpoint: Path, preset: str, ids: list[int]) -> Floats:
    """What the NumPy meanings of a preset's graph give."""
    graph = build_graph(open_checkpoint(checkpoint))
    run_pipeline(graph, PIPELINES[preset])
    return Stepper(graph).step({0: ids})[0]


@pytest.mark.parametrize("preset", LIMITS)
@pytest.mark.parametrize("variant", RELATED)
def test_presets_stay_near_transformers(variant: str, preset: str, builder: Builder) -> None:
    checkpoint = builder.checkpoint(variant)
    ids = random_ids(checkpoint, 41)
    assert error(logits_of_graph(checkpoint, preset, ids), hf_logits(checkpoint, ids)) < LIMITS[preset][0]


@pytest.mark.parametrize(("variant", "preset"), ENGINES)
def test_engines_compute_their_graphs(variant: str, preset: str, builder: Builder) -> None:
    checkpoint = builder.checkpoint(variant)
    ids = random_ids(checkpoint, 41)
    with Engine.load(builder.engine(variant, preset, kv_cache=KV_CACHE), threads=2, kv_tokens=512) as engine:
        at_once = np.array(engine.logits(ids))
        stepper = EngineStepper(engine, sequences=2)
        steps = [{0: ids[:9], 1: ids[:3]}, {0: ids[9:10]}, {1: ids[3:5], 0: ids[10:]}]
        np.testing.assert_array_equal(np.concatenate([stepper.step(step)[0] for step in steps]), at_once)
    assert error(at_once, logits_of_graph(checkpoint, preset, ids)) < LIMITS[preset][1]


def test_gpus_compute_what_graphs_mean(builder: Builder, tmp_path: Path, interpreted_gpu: InterpretedDevice) -> None:
    checkpoint = builder.checkpoint("qwen3")
    ids = random_ids(checkpoint, 15)
    out = build(BuildRequest(checkpoint, tmp_path / "engine", "a100x1", "int8", kv_cache=KV_CACHE, drift=False))
    with Engine.load(out, kv_tokens=256) as engine:
        assert error(engine.logits(ids), logits_of_graph(checkpoint, "int8", ids)) < LIMITS["int8"][1]
