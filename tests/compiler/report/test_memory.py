"""Where an engine's bytes are, from programs of tiny graphs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest

from belle_compile.compiler.backends.base import Footprint, KVCache, MemoryNeed, Payload
from belle_compile.compiler.backends.program.rules import RULES
from belle_compile.compiler.backends.tvm import TvmBackend
from belle_compile.compiler.backends.tvm.lower import lower
from belle_compile.compiler.ir.ops import REGISTRY
from belle_compile.compiler.report import Memory, coverage_of, coverage_of_set, memory_of
from belle_compile.passes.pipeline import run_pipeline
from belle_compile.runtime.artifact import KernelCalls
from tests.passes.helpers import HEAD_DIM, HEADS, HIDDEN, VOCABULARY, bloom, llama
from tests.pipelines import PIPELINES


def memory(model: ir.Model, preset: str, kv_heads: int) -> Memory:
    run_pipeline(model, PIPELINES[preset])
    model.metadata_props.update(num_layers="2", num_kv_heads=str(kv_heads), head_dim=str(HEAD_DIM), max_position="64")
    lowered = lower(model, 0)
    return memory_of(TvmBackend().payload(lowered, lowered.program, lambda seal: {}, {}))


def padded(count: int, multiple: int = 16) -> int:
    return -(-count // multiple) * multiple


def test_parts_of_float32_weights_by_hand() -> None:
    found = memory(llama(layers=2, last_norm=True), "none", 2)
    rows = padded(VOCABULARY)
    assert found.weights["head"] == 4 * rows * HIDDEN
    assert found.weights["attention"] == 2 * 4 * (32 + 16 + 16 + 32) * 32
    assert found.weights["feed-forward"] == 2 * 4 * (96 * 32 + 32 * 48)
    kv = found.kv
    assert kv.block_bytes == 2 * 2 * 2 * HEAD_DIM * 16 * 4 and found.kv_token == kv.block_bytes / 16
    assert (found.kv_tokens, kv.max_context, found.need.kv_cache) == (64, 64, 4 * kv.block_bytes)
    assert found.need.reserve == (32 + 256) << 20


@pytest.mark.parametrize(("make", "kv_heads"), [(llama, 2), (bloom, HEADS)])
@pytest.mark.parametrize("preset", PIPELINES)
def test_parts_add_up_and_buffers_fit(make: Callable[..., ir.Model], kv_heads: int, preset: str) -> None:
    model = make(last_norm=True)
    found = memory(model, preset, kv_heads)
    _, weights, _, buffers = lower(model, 0)
    assert sum(found.weights.values()) == found.need.weights == sum(weight.bytes for weight in weights)
    assert found.arena is not None and found.arena.bytes == found.need.activations
    assert all(found.weights[part] for part in ("attention", "feed-forward", "norms and tables"))
    tied = make is bloom and preset in ("none", "int8-plain")  # rotations give the head a table of its own
    assert ("embedding and head, shared" in found.weights) == tied
    assert ("embedding" in found.weights) == (not tied)
    assert ("head" in found.weights) == (not (tied and preset == "none")), "the head's own correction and scales"
    assert found.arena.buffers == tuple(buffers) == tuple(sorted(buffers, key=lambda buffer: buffer.first))
    assert max(buffer.offset + buffer.bytes for buffer in buffers) <= found.arena.bytes
    assert sum(buffer.last == found.arena.calls for buffer in buffers) == 1, "the logits'"


def test_ops_without_a_kernel() -> None:
    assert REGISTRY.keys() - RULES.keys() == {"Identity", "IntegerLinear", "Dequantize"}, "passes remove or fuse these"


def test_memory_of_a_backend_without_a_program() -> None:
    footprint = Footprint(1000, 200, 30, KVCache("float32", 64, 16, 100))
    found = memory_of(Payload({}, (), footprint, KernelCalls(2, 1)))
    assert found.need == MemoryNeed(1000, 7 * 64, 200, 30) and found.need.total == 1230 + 7 * 64
    assert (found.weights, found.arena, found.kv_tokens) == ({"all weights": 1000}, None, 100)


def test_coverage_by_hand() -> None:
    found = coverage_of([[1, 2, 3], [3] * 17], [[5] * 40], 10)
    assert found == {
        "requests": {"to calibrate with": 2, "held out": 1},
        "tokens": {"to calibrate with": 20, "held out": 40},
        "longest_request_tokens": 40,
        "length_histogram": {"1 to 16": 1, "17 to 32": 1, "33 to 64": 1},
        "different_tokens": 3,
        "token_coverage": 0.3,
    }
    assert coverage_of([[1] * 3000], [[1] * 200], 10)["length_histogram"] == {
        "129 to 256": 1, "257 to 512": 0, "513 to 1024": 0, "1025 to 2048": 0, "over 2048": 1,
    }  # fmt: skip
    assert coverage_of([], [], 10)["length_histogram"] == {}


def test_coverage_of_a_set(tmp_path: Path) -> None:
    assert coverage_of_set(tmp_path) == coverage_of_set(tmp_path / "requests.jsonl") == {}
    (tmp_path / "coverage.json").write_text('{"dropped": {"a duplicate": 3}}')
    assert coverage_of_set(tmp_path) == {"set": {"dropped": {"a duplicate": 3}}}
    (tmp_path / "coverage.json").write_text("{")
    assert coverage_of_set(tmp_path) == {}
