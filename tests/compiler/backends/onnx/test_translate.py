"""The translation into ONNX computes what the ops mean: variants and presets, and single ops where these do not reach."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

pytest.importorskip("onnxruntime")

from belle_compile.compiler import backends
from belle_compile.compiler.backends.onnx import rules
from belle_compile.compiler.backends.onnx.interface import GenAIInterface, ServingInterface
from belle_compile.compiler.backends.onnx.translate import translate
from belle_compile.compiler.checkpoint import open_checkpoint
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.families import build_graph
from belle_compile.compiler.ir.evaluate import PagedCache, evaluate
from belle_compile.compiler.stages import carried
from belle_compile.passes.fusion.fuse_add_norm import FuseAddNorm
from belle_compile.passes.fusion.fuse_dequantize import FuseDequantize
from belle_compile.passes.fusion.fuse_projections import FuseProjections
from belle_compile.passes.pipeline import passes_of, run_pipeline
from belle_compile.passes.presets import PRESETS
from belle_compile.passes.quantization.quantize_linears import QuantizeLinears
from belle_compile.passes.rotation.rotate_activations import RotateActivations
from belle_compile.runtime.memory import WeightsFile
from tests.compiler.backends.onnx import harness
from tests.parity.engines import Builder
from tests.parity.lowest_weights import with_lowest_weights
from tests.parity.stepping import Stepper, relative_error
from tests.parity.variants import hf_logits, make_llama, random_ids
from tests.passes.helpers import HIDDEN, VOCABULARY, Tiny
from tests.pipelines import CLEANUP

PROMPT = 21
SAME_INTEGERS = 2e-6  # of the largest logit: no activation is rounded to another integer
WIDE = 2e-4  # with 16 bits, some are


def graph(checkpoint: Path, preset: str) -> ir.Model:
    """A checkpoint's graph as the backend gets it."""
    recipe = PRESETS[preset].recipe
    before, fusions = carried(passes_of(recipe), backends.get("onnxruntime"), recipe)
    model = build_graph(open_checkpoint(checkpoint))
    run_pipeline(model, (*before, *fusions))
    return model


@pytest.mark.parametrize("variant", ["bloom", "bloom_3_heads", "llama_gqa", "llama_tied", "llama_biases", "llama_dynamic_rope"])
@pytest.mark.parametrize(
    ("preset", "tolerance"), [("int8", SAME_INTEGERS), ("int8-plain", SAME_INTEGERS), ("int8-accurate", WIDE)]
)
def test_logits_are_those_of_the_meanings(
    builder: Builder, variant: str, preset: str, tolerance: float, tmp_path: Path
) -> None:
    model, ids = graph(builder.checkpoint(variant), preset), random_ids(builder.checkpoint(variant), PROMPT)
    steps = [ids[:13], ids[13:20], ids[20:]]
    stepper = Stepper(model)
    expected = np.concatenate([stepper.step({0: step})[0] for step in steps])
    assert relative_error(harness.run(model, tmp_path, steps), expected) < tolerance


@pytest.mark.parametrize("preset", ["int8", "int8-plain"])
def test_weights_of_minus_128_are_exact(builder: Builder, preset: str, tmp_path: Path) -> None:
    model, ids = graph(builder.checkpoint("llama_biases"), preset), random_ids(builder.checkpoint("llama_biases"), PROMPT)
    assert with_lowest_weights(model) == 9
    steps, stepper = [ids[:20], ids[20:]], Stepper(model)
    expected = np.concatenate([stepper.step({0: step})[0] for step in steps])
    assert relative_error(harness.run(model, tmp_path, steps), expected) < SAME_INTEGERS


@pytest.mark.parametrize("small", [0, rules.SMALL], ids=["gate and up apart", "together"])
@pytest.mark.parametrize("mlp_bias", [False, True])
@pytest.mark.parametrize(("bits", "tolerance"), [(8, SAME_INTEGERS), (16, WIDE)])
def test_signs_of_rotations(
    bits: int, tolerance: float, mlp_bias: bool, small: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without biases, the scales of up have them."""
    monkeypatch.setattr(rules, "SMALL", small)
    checkpoint = make_llama(tmp_path / "checkpoint", intermediate_size=96, mlp_bias=mlp_bias)
    model, ids = rotated(checkpoint, bits), random_ids(checkpoint, PROMPT)
    expected = Stepper(model).step({0: ids})[0]
    assert relative_error(harness.run(model, tmp_path, [ids]), expected) < tolerance
    operands = [name for node in read(model).node for name in node.input]
    rotations, signed = (sum(name.startswith(start) for name in operands) for start in ("hadamard.shape", "hadamard.signs"))
    assert (rotations, signed) == (2, 2 if mlp_bias else 0)


def rotated(checkpoint: Path, bits: int) -> ir.Model:
    """A checkpoint's graph with the activations of down rotated, as the backend gets it."""
    model = build_graph(open_checkpoint(checkpoint))
    fusions = FuseDequantize(), FuseProjections(), FuseAddNorm()
    run_pipeline(model, (*CLEANUP, RotateActivations(), QuantizeLinears(activation_bits=bits), *fusions))
    return model


def read(model: ir.Model) -> onnx.GraphProto:
    """The graph of a model's translation."""
    return onnx.load_from_string(translate(model, ServingInterface()).content).graph


def quantized(bits: int, step: float | None, bias: bool) -> ir.Model:
    """An embedding with a row of zeros, whose rows are quantized and multiplied."""
    b = Tiny()
    table = np.random.default_rng(1).standard_normal((VOCABULARY, HIDDEN)).astype(np.float32)
    table[3] = 0
    x = b.op("Gather", b.weight("table", table), b.inputs.token_ids, name="x")
    steps = [] if step is None else [b.weight("step", np.array([step], np.float32))]
    xq, xs = b.ops("QuantizeTokens", x, *steps, name="q", bits=bits)
    integers = np.random.default_rng(2).integers(-127, 128, (48, HIDDEN)).astype(np.int8)
    scales = b.weight("scales", np.random.default_rng(3).random(48).astype(np.float32))
    biases = [b.random("bias", 48)] if bias else []
    y = b.op("QuantizedLinear", xq, xs, b.weight("integers", integers), scales, *biases, name="y")
    rows = b.op("Gather", y, b.inputs.logit_rows, name="rows")
    return b.finish(b.linear(rows, "head", VOCABULARY))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("step", [None, 0.02, 1e-5])  # the last two clip some and almost all values
@pytest.mark.parametrize("bits", [8, 16])
def test_quantized_linears(bits: int, step: float | None, bias: bool, tmp_path: Path) -> None:
    model = quantized(bits, step, bias)
    ids = np.arange(VOCABULARY, dtype=np.int32)
    zeros = np.zeros(VOCABULARY, np.int32)
    inputs = {"token_ids": ids, "positions": ids, "sequences": zeros, "block_table": zeros[:1, None], "logit_rows": ids}
    expected = evaluate(model, inputs, PagedCache(1, 1, 1, 1))["logits"]
    assert relative_error(harness.run(model, tmp_path, [ids.tolist()]), expected) < 1e-6


def test_no_product_has_a_scale_for_each_output(builder: Builder) -> None:
    """ONNX Runtime would copy the scales one by one in each run, before the product."""
    model = read(graph(builder.checkpoint("llama_gqa"), "int8"))
    sizes = {tensor.name: int(np.prod(tensor.dims)) for tensor in model.initializer}
    products = [node for node in model.node if node.op_type == "MatMulIntegerToFloat"]
    assert products
    assert {sizes[scale] for node in products for scale in node.input[2:4]} == {1}


def test_the_file_is_standard_onnx_whose_data_is_safetensors(builder: Builder, tmp_path: Path) -> None:
    checkpoint = builder.checkpoint("llama_tied")
    translated = translate(graph(checkpoint, "int8"), ServingInterface())
    path = harness.save(translated, tmp_path)
    onnx.checker.check_model(str(path))
    weights = WeightsFile(tmp_path / "weights.safetensors")
    stored = {tensor.name: tensor for tensor in onnx.load(path, load_external_data=False).graph.initializer}
    external = {name: tensor for name, tensor in stored.items() if tensor.external_data}
    assert set(external) == set(weights.sizes)
    for name, tensor in external.items():
        facts = {entry.key: entry.value for entry in tensor.external_data}
        assert (facts["location"], int(facts["offset"])) == ("weights.safetensors", weights.offset(name))
        assert 0 <= weights.sizes[name] - int(facts["length"]) < 64
    assert sum(tensor.ByteSize() for name, tensor in stored.items() if name not in external) < 1 << 16, "no weight is inline"


def test_the_same_graph_gives_the_same_bytes(builder: Builder) -> None:
    first, second = (translate(graph(builder.checkpoint("bloom"), "int8"), ServingInterface()) for _ in range(2))
    assert first.content == second.content
    for one, other in zip(first.weights, second.weights, strict=True):
        assert (one.name, one.pack().tobytes()) == (other.name, other.pack().tobytes())


@pytest.mark.parametrize("variant", ["bloom", "llama_gqa", "llama_dynamic_rope"])
def test_the_interface_of_genai(builder: Builder, variant: str, tmp_path: Path) -> None:
    checkpoint = builder.checkpoint(variant)
    path = harness.save(translate(graph(checkpoint, "none"), GenAIInterface()), tmp_path)
    onnx.checker.check_model(str(path))
    session, ids = harness.Session(path), random_ids(checkpoint, PROMPT)
    mask = np.ones((1, PROMPT), np.int64)
    logits = session.run({"input_ids": np.array([ids], np.int64), "attention_mask": mask})
    assert relative_error(logits[0], hf_logits(checkpoint, ids)) < 1e-5


def test_an_op_without_translation_is_refused(builder: Builder) -> None:
    model = build_graph(open_checkpoint(builder.checkpoint("llama_biases")))
    run_pipeline(model, passes_of(PRESETS["int4"].recipe))
    with pytest.raises(CompileError, match=r"^onnx: op \w+ \(node [\w.]+\): found no translation\.$"):
        translate(model, ServingInterface())
