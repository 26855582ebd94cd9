"""Graphs with adapters that are not merged compute what the merged model does, after any passes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from belle_compile.compiler.adapter_basis import basis_of
from belle_compile.compiler.checkpoint import open_checkpoint
from belle_compile.compiler.families import build_graph
from belle_compile.compiler.ir.evaluate import PagedCache, evaluate
from belle_compile.compiler.reading import AdapterChoice, Reading
from belle_compile.passes.adapters.linears import adapted_linears
from belle_compile.passes.base import Phase
from belle_compile.passes.pipeline import at_fusion, passes_of, run_pipeline
from belle_compile.passes.presets import recipe_of
from belle_compile.runtime.adapters.factors import Factors
from belle_compile.runtime.adapters.peft import Adapter, read_adapter
from tests.compiler.checkpoint.overlays.adapters import make_adapter
from tests.parity.variants import VARIANTS

Floats = npt.NDArray[np.float32]
IDS = [3, 17, 40, 5, 9, 22, 8]
NAMES = {
    "bloom": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "bloom_residual_after_norm": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "llama_gqa": "all-linear",
}


class Changes:
    """One adapter for all sequences."""

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter

    def factors(self, sequence: int, target: str) -> Factors | None:
        return self._adapter.changes.get(target)


def logits(model: ir.Model, ids: Sequence[int], adapters: Any = None) -> Floats:
    cache = PagedCache(*(int(model.metadata_props[key]) for key in ("num_layers", "num_kv_heads", "head_dim")), 8)
    count = len(ids)
    inputs = {
        "token_ids": np.array(ids, np.int32),
        "positions": np.arange(count, dtype=np.int32),
        "sequences": np.zeros(count, np.int32),
        "block_table": np.arange(8, dtype=np.int32)[None],
        "logit_rows": np.arange(count, dtype=np.int32),
    }
    return evaluate(model, inputs, cache, adapters=adapters)["logits"]


def mean_error(found: Floats, expected: Floats) -> float:
    return float(np.abs(found - expected).mean())


@pytest.fixture(scope="module", params=sorted(NAMES))
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return VARIANTS[request.param](tmp_path_factory.mktemp("bases") / request.param)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("adapters") / base.name, target_modules=NAMES[base.name], r=5)


@pytest.mark.parametrize("preset", ["none", "int8", "int8-accurate", "rotated floats"])
def test_graphs_with_an_adapter_compute_what_the_merged_model_does(base: Path, adapter: Path, preset: str) -> None:
    merged = build_graph(open_checkpoint(base, reading=Reading(adapters=(AdapterChoice(str(adapter)),))))
    plain = build_graph(open_checkpoint(base))
    recipe = recipe_of("int8" if preset == "rotated floats" else preset, None, calibrated=False)
    passes = passes_of(recipe, lora_rank=8)
    if preset == "rotated floats":
        passes = tuple(step for step in passes if step.phase is not Phase.QUANTIZATION)
    before, after = at_fusion(passes)
    model = plain.clone()
    run_pipeline(model, before)
    basis = basis_of(adapted_linears(model.graph)[0])
    run_pipeline(model, after)
    changes = Changes(read_adapter(adapter, basis, 8))
    expected, without = logits(merged, IDS), logits(plain, IDS)
    assert np.abs(expected - without).max() > 1
    error, of_base = mean_error(logits(model, IDS, changes), expected), mean_error(logits(model, IDS), without)
    if "int8" in preset:  # the adapter adds no error to that of quantizing its base
        assert 0 < error < 1.5 * of_base
    else:
        assert max(error, of_base) < 1e-5
        assert np.abs(logits(model, IDS, changes) - expected).max() < 1e-4
