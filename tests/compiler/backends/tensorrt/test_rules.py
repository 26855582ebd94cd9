"""The ONNX that plans are built from computes what the graph means, by ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from belle_compile.compiler.backends.tensorrt.build import write_model
from belle_compile.compiler.backends.tensorrt.rules import translate
from belle_compile.compiler.errors import CompileError
from belle_compile.passes.pipeline import passes_of, run_pipeline
from belle_compile.passes.presets import recipe_of
from tests.compiler.backends.tensorrt.graphs import Runner, graph, stepped
from tests.parity.lowest_weights import with_lowest_weights
from tests.parity.stepping import Stepper, relative_error
from tests.parity.variants import VARIANTS, hf_step_logits, random_ids

CAPACITY = 64


@pytest.mark.parametrize("name", VARIANTS)
def test_floats_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    checkpoint, model = graph(name, "none", tmp_path)
    ids = random_ids(checkpoint, 40, 1)
    expected = hf_step_logits(checkpoint, [ids[:17], ids[17:18], ids[18:]])
    found = stepped(translate(model, "float32", CAPACITY), tmp_path, ids)
    assert relative_error(found, expected) < 1e-5
    halved = stepped(translate(model, "float16", CAPACITY), tmp_path, ids)
    assert 1e-5 < relative_error(halved, expected) < 1e-2


@pytest.mark.parametrize(("preset", "tolerance"), [("int8", 1e-5), ("int8-accurate", 2e-3)])
@pytest.mark.parametrize("name", ["bloom_untied", "llama_tied", "llama_biases", "llama_dynamic_rope"])
def test_integers_are_those_of_the_graph(name: str, preset: str, tolerance: float, tmp_path: Path) -> None:
    checkpoint, model = graph(name, preset, tmp_path)
    ids = random_ids(checkpoint, 40, 1)
    stepper = Stepper(model)
    expected = np.concatenate([stepper.step({0: step})[0] for step in (ids[:17], ids[17:18], ids[18:])])
    found = stepped(translate(model, "float32", CAPACITY), tmp_path, ids)
    assert np.median(np.abs(found - expected)) < tolerance * np.abs(expected).max()
    assert (found.argmax(-1) == expected.argmax(-1)).mean() > 0.9


def test_weights_of_minus_128_are_exact(tmp_path: Path) -> None:
    checkpoint, model = graph("llama_biases", "int8", tmp_path)
    assert with_lowest_weights(model) > 9
    ids, stepper = random_ids(checkpoint, 40, 1), Stepper(model)
    expected = np.concatenate([stepper.step({0: step})[0] for step in (ids[:17], ids[17:18], ids[18:])])
    assert relative_error(stepped(translate(model, "float32", CAPACITY), tmp_path, ids), expected) < 1e-5


@pytest.mark.parametrize(("preset", "products"), [("none", 0), ("int8", 9), ("int8-accurate", 0)])
def test_the_model_is_standard_onnx(preset: str, products: int, tmp_path: Path) -> None:
    _, model = graph("bloom", preset, tmp_path)
    translated = translate(model, "float16", CAPACITY)
    write_model(translated, tmp_path)
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)
    checked = onnx.load(str(tmp_path / "model.onnx"), load_external_data=False)
    assert {node.domain for node in checked.graph.node} == {""}
    quantized = {node.output[0] for node in checked.graph.node if node.op_type == "QuantizeLinear"}
    rounded = {
        node.output[0] for node in checked.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in quantized
    }
    read = [node for node in checked.graph.node if node.op_type == "MatMul" and node.input[0] in rounded]
    assert len(read) == products + (4 if products else 0), "query, key and value of two layers are products of their own"
    assert translate(model, "float16", CAPACITY).content == translated.content


def test_what_is_behind_a_token_leaves_no_trace(tmp_path: Path) -> None:
    checkpoint, model = graph("llama_gqa", "none", tmp_path)
    ids = random_ids(checkpoint, 30, 2)
    translated = translate(model, "float32", CAPACITY)
    one, other = Runner(translated, tmp_path), Runner(translated, tmp_path)
    for name, values in other.cache.items():
        other.cache[name] = values * 1e4
    assert (one.step(ids[:20], filled=4) == other.step(ids[:20], filled=4)).all()
    assert (one.step(ids[20:]) == other.step(ids[20:])).all()
    last = Runner(translated, tmp_path)
    last.length = CAPACITY - 1
    assert np.isfinite(last.step(ids[:1])).all(), "tables reach as far as the cache"


def test_scales_of_single_tokens_are_refused(tmp_path: Path) -> None:
    _, model = graph("llama", "none", tmp_path)
    run_pipeline(model, passes_of(recipe_of("int8-plain", None, calibrated=False))[:6])
    with pytest.raises(CompileError, match=r"op QuantizeTokens .*: found a scale for each token; add static to --methods"):
        translate(model, "float16", CAPACITY)
