"""Engines with activations of 16 bits against Transformers with nothing rounded but the weights and the KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from belle_compile.compiler import driver
from belle_compile.passes.pipeline import FUSION
from belle_compile.passes.quantization.quantize_embedding import QuantizeEmbedding
from belle_compile.passes.quantization.quantize_linears import QuantizeLinears
from belle_compile.passes.quantization.weights import quantize_rows
from belle_compile.runtime import Engine
from belle_compile.runtime.host import host_isas
from benchmarks.simulation import HalfCache
from tests.parity.engines import Builder, EngineStepper, Floats
from tests.parity.variants import hf_logits, load_hf, random_ids
from tests.pipelines import CLEANUP

CASES = [("bloom", host_isas()[0]), *(("llama_gqa", isa) for isa in host_isas())]
TOLERANCE = 1e-3  # activations are as good as exact; what is left is mostly values of the cache rounded to the other side
KV_CACHE = "float16"  # finer than bfloat16, so that little else is rounded


@pytest.fixture
def unrotated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Builder:
    """Builds int8-accurate without rotations: the reference rounds the checkpoint's own weights."""
    linears = QuantizeLinears(activation_bits=16)
    passes = (*CLEANUP, linears, QuantizeEmbedding(), *FUSION)
    monkeypatch.setattr(driver, "passes_of", lambda *arguments, **options: passes)
    return Builder(tmp_path)


def weight_only_logits(checkpoint: Path, ids: Sequence[int]) -> Floats:
    """The model with each linear layer's and embedding's rows replaced by int8 * scale, keys and values in float16."""
    model = load_hf(checkpoint)
    with torch.inference_mode():
        for module in model.modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
                integers, scales = quantize_rows(module.weight.numpy(), "weight")
                module.weight.copy_(torch.from_numpy(integers * scales[:, None]))
        logits: Floats = (
            model(torch.tensor([list(ids)]), past_key_values=HalfCache(torch.float16), use_cache=True).logits[0].numpy()
        )
    return logits


def error(found: Floats, expected: Floats) -> float:
    """Root of the mean square of the differences, over that of what is expected."""
    return float(np.sqrt(np.square(found - expected).mean() / np.square(expected).mean()))


@pytest.mark.parametrize(("variant", "isa"), CASES)
def test_the_error_is_that_of_the_weights(unrotated: Builder, variant: str, isa: str) -> None:
    checkpoint = unrotated.checkpoint(variant)
    ids = random_ids(checkpoint, 41)
    weight_only, exact = weight_only_logits(checkpoint, ids), hf_logits(checkpoint, ids)
    with Engine.load(unrotated.engine(variant, "int8-accurate", (isa,), KV_CACHE), threads=2, kv_tokens=512) as engine:
        at_once = np.array(engine.logits(ids))
        np.testing.assert_array_equal(engine.logits(ids, start=38), at_once[38:])
        stepper = EngineStepper(engine)
        stepped = np.concatenate([stepper.step({0: step})[0] for step in (ids[:33], *([token] for token in ids[33:]))])
    for got in (at_once, stepped):
        assert error(got, weight_only) < TOLERANCE
        assert error(got, exact) == pytest.approx(error(weight_only, exact), abs=TOLERANCE)
    assert error(weight_only, exact) > 5 * TOLERANCE, "too small an error to tell the two apart"


def test_activations_of_8_bits_are_told_apart(builder: Builder) -> None:
    """The comparison above would notice them."""
    checkpoint = builder.checkpoint("llama_gqa")
    ids = random_ids(checkpoint, 41)
    with Engine.load(builder.engine("llama_gqa", "int8-plain", kv_cache=KV_CACHE), threads=2, kv_tokens=512) as engine:
        assert error(np.array(engine.logits(ids)), weight_only_logits(checkpoint, ids)) > 5 * TOLERANCE
