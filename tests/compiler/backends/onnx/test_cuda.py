"""The translation for ONNX Runtime's CUDA provider: what it computes, by the CPU provider, and that every op has a CUDA kernel.

The CPU provider has kernels for all ops of these models, in float16 too, or computes them in float32 and rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest

pytest.importorskip("onnxruntime")

import onnxruntime

from belle_compile.compiler.backends.onnx.cuda import CudaInterface, CudaKernels
from belle_compile.compiler.backends.onnx.graph import OnnxModel
from belle_compile.compiler.backends.onnx.interface import ServingInterface
from belle_compile.compiler.backends.onnx.translate import translate
from belle_compile.compiler.ir.evaluate import PagedCache, evaluate
from tests.compiler.backends.onnx import harness
from tests.compiler.backends.onnx.cuda_kernels import without_kernel
from tests.compiler.backends.onnx.test_translate import graph, quantized
from tests.parity.engines import Builder
from tests.parity.lowest_weights import with_lowest_weights
from tests.parity.stepping import Stepper, relative_error
from tests.parity.variants import hf_logits, random_ids
from tests.passes.helpers import HIDDEN, VOCABULARY

Floats = npt.NDArray[np.float32]
CAPACITY = 192
VARIANTS = ("bloom", "bloom_3_heads", "llama_gqa", "llama_tied", "llama_biases", "llama_dynamic_rope")
STEPS = (17, 1, 1, 22)  # tokens of each run
FILLED = 3  # tokens that fill up each run of several, and that do not count
# As shares of the largest logit. Attention, and without quantization every product, is in float16.
HALF = 1e-2
# An activation may be rounded to another integer then; of 16 bits, that is little.
TOLERANCE = {"none": HALF, "int8": 6e-2, "int8-accurate": HALF}


def translated(source: ir.Model) -> OnnxModel:
    return translate(source, CudaInterface(CAPACITY), CudaKernels(CAPACITY))


def run(path: Path, ids: Sequence[int], steps: Sequence[int], sequences: int = 1) -> Floats:
    """The logits [tokens, vocabulary] of one of several equal sequences, whose tokens come in runs that are filled up."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session: Any = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    past = [entry for entry in session.get_inputs() if entry.name.startswith("past_key_values")]
    assert {(entry.type, entry.shape[2]) for entry in past} <= {("tensor(float16)", CAPACITY)}
    cache = {entry.name: np.zeros((sequences, *entry.shape[1:]), np.float16) for entry in past}
    names, outputs = {entry.name for entry in session.get_inputs()}, [entry.name for entry in session.get_outputs()]
    logits, done = [], 0
    for count in steps:
        tokens = [*ids[done : done + count], *[7] * (FILLED if count > 1 else 0)]
        inputs = {
            "input_ids": np.tile(np.array(tokens, np.int32), (sequences, 1)),
            "positions": np.tile(np.arange(done, done + len(tokens), dtype=np.int32), (sequences, 1)),
            "last_positions": np.full(sequences, done + len(tokens) - 1, np.int32),
            "rope_lengths": np.full(sequences, done + count, np.int32),
            "logit_rows": np.arange(count, dtype=np.int32) + (sequences - 1) * len(tokens),
        }
        results = session.run(None, {name: array for name, array in inputs.items() if name in names} | cache)
        found = dict(zip(outputs, results, strict=True))
        cache = {name: found[name.replace("past_key_values", "present")] for name in cache}
        logits.append(found["logits"])
        done += count
    return np.concatenate(logits)


def test_weights_of_minus_128_are_exact(builder: Builder, tmp_path: Path) -> None:
    checkpoint = builder.checkpoint("llama_biases")
    source, ids = graph(checkpoint, "int8"), random_ids(checkpoint, sum(STEPS))
    assert with_lowest_weights(source) == 9
    stepper, ends = Stepper(source), np.cumsum(STEPS)
    expected = np.concatenate([stepper.step({0: ids[end - count : end]})[0] for end, count in zip(ends, STEPS, strict=True)])
    assert relative_error(run(harness.save(translated(source), tmp_path), ids, STEPS), expected) < HALF


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("preset", TOLERANCE)
def test_logits_and_kernels(builder: Builder, variant: str, preset: str, tmp_path: Path) -> None:
    checkpoint = builder.checkpoint(variant)
    source, ids = graph(checkpoint, preset), random_ids(checkpoint, sum(STEPS))
    path = harness.save(translated(source), tmp_path)
    onnx.checker.check_model(str(path))
    assert without_kernel(path) == []
    stepper, ends = Stepper(source), np.cumsum(STEPS)
    expected = np.concatenate([stepper.step({0: ids[end - count : end]})[0] for end, count in zip(ends, STEPS, strict=True)])
    found = run(path, ids, STEPS)
    assert relative_error(found, expected) < TOLERANCE[preset]
    if preset == "none" and variant != "llama_dynamic_rope":  # whose frequencies depend on the length of each step
        assert relative_error(found, hf_logits(checkpoint, ids)) < HALF


def test_nodes_that_the_provider_has_no_kernel_for_are_found(builder: Builder, tmp_path: Path) -> None:
    path = harness.save(translate(graph(builder.checkpoint("llama_gqa"), "int8"), ServingInterface()), tmp_path)
    found = {line.split(": ", 1)[1] for line in without_kernel(path)}
    assert "MatMulIntegerToFloat 1 of uint8" in found
    path = harness.save(translate(graph(builder.checkpoint("llama_biases"), "none"), ServingInterface()), tmp_path)
    found = {line.split(": ", 1)[1] for line in without_kernel(path)}
    assert found == {"GroupQueryAttention 1 of float32"}


@pytest.mark.parametrize("step", [None, 0.02])
@pytest.mark.parametrize("bits", [8, 16])
def test_quantized_linears(bits: int, step: float | None, tmp_path: Path) -> None:
    """Products and roundings are those of the meanings; some outputs fill up a multiple of 32 and are cut off."""
    source = quantized(bits, step, bias=True)
    ids = np.arange(VOCABULARY, dtype=np.int32)
    zeros = np.zeros(VOCABULARY, np.int32)
    inputs = {"token_ids": ids, "positions": ids, "sequences": zeros, "block_table": zeros[:1, None], "logit_rows": ids}
    expected = evaluate(source, inputs, PagedCache(1, 1, 1, 1))["logits"]
    model = translated(source)
    widths = {tensor.dims for tensor in model.weights if tensor.name == "integers.transposed"}
    assert widths == {(HIDDEN, 64)}, "48 outputs"
    path = harness.save(model, tmp_path)
    assert without_kernel(path) == []
    assert relative_error(run(path, ids.tolist(), [VOCABULARY]), expected) < HALF, "the head is float16"


def test_a_token_has_the_same_bits_alone_and_among_others(builder: Builder, tmp_path: Path) -> None:
    """By the CPU provider: every product is one of integers, and attention is computed for each sequence apart."""
    checkpoint = builder.checkpoint("llama_gqa")
    ids, path = random_ids(checkpoint, 30), harness.save(translated(graph(checkpoint, "int8")), tmp_path)
    alone, among = (run(path, ids, [1] * 30, sequences) for sequences in (1, 5))
    np.testing.assert_array_equal(alone, among)


@pytest.mark.parametrize("variant", ["bloom", "llama_gqa"])
def test_the_same_graph_gives_the_same_bytes(builder: Builder, variant: str) -> None:
    first, second = (translated(graph(builder.checkpoint(variant), "int8")) for _ in range(2))
    assert first.content == second.content
    assert [tensor.pack().tobytes() for tensor in first.weights] == [tensor.pack().tobytes() for tensor in second.weights]


@pytest.mark.parametrize("variant", ["bloom", "llama_biases"])
def test_nothing_but_tokens_and_the_cache_is_an_input(builder: Builder, variant: str) -> None:
    inputs = {name for name in translated(graph(builder.checkpoint(variant), "int8")).inputs if "past" not in name}
    positions = {"positions"} if variant == "bloom" else set()  # ALiBi alone needs them
    assert inputs == {"input_ids", "last_positions", "logit_rows"} | positions
