"""Activations that are rotated while running: engines against Transformers, and against the meaning of their graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from belle_compile.compiler import driver
from belle_compile.compiler.checkpoint import open_checkpoint
from belle_compile.compiler.driver import BuildRequest, build
from belle_compile.compiler.families import build_graph
from belle_compile.passes.base import Pass
from belle_compile.passes.fusion.fuse_add_norm import FuseAddNorm
from belle_compile.passes.fusion.fuse_projections import FuseProjections
from belle_compile.passes.pipeline import FUSION, run_pipeline
from belle_compile.passes.quantization.quantize_embedding import QuantizeEmbedding
from belle_compile.passes.quantization.quantize_linears import QuantizeLinears
from belle_compile.passes.rotation.rotate_activations import RotateActivations
from belle_compile.runtime import Engine
from belle_compile.runtime.program_json import read_program
from tests.parity.engines import BEST_ISA
from tests.parity.stepping import Stepper, relative_error
from tests.parity.variants import hf_logits, make_bloom, make_llama, random_ids
from tests.pipelines import CLEANUP

FLOAT = (*CLEANUP, RotateActivations(), FuseProjections(), FuseAddNorm())
WIDE = (*CLEANUP, RotateActivations(), QuantizeLinears(activation_bits=16), QuantizeEmbedding(), *FUSION)
Maker = Callable[..., Path]


@pytest.fixture(params=[(make_llama, {"intermediate_size": 96}), (make_bloom, {})], ids=["llama", "bloom"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Feed-forward layers of 3 blocks of 32 channels, and of one of 256."""
    make, changes = request.param
    directory: Path = make(tmp_path / "checkpoint", **changes)
    return directory


def engine(checkpoint: Path, passes: Sequence[Pass], monkeypatch: pytest.MonkeyPatch) -> Path:
    """An engine of these passes."""
    monkeypatch.setattr(driver, "passes_of", lambda *arguments, **options: passes)
    request = BuildRequest(checkpoint, checkpoint.parent / "engine", quantization="none", isas=(BEST_ISA,), kv_cache="float32")
    return build(request)


def test_unquantized(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, ids = engine(checkpoint, FLOAT, monkeypatch), random_ids(checkpoint, 21)
    kinds = [call.kind for call in read_program(directory / "rank0").calls]
    assert kinds.count("hadamard") == kinds.count("activation") == 2
    with Engine.load(directory, threads=2, kv_tokens=256) as loaded:
        assert relative_error(loaded.logits(ids), hf_logits(checkpoint, ids)) < 1e-5


def test_quantized(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With activations of 16 bits, for which a value that is rounded the other way is not felt."""
    graph = build_graph(open_checkpoint(checkpoint))
    run_pipeline(graph, WIDE)
    assert not [node for node in graph.graph if node.op_type == "BlockHadamard"]
    ids = random_ids(checkpoint, 21)
    with Engine.load(engine(checkpoint, WIDE, monkeypatch), threads=2, kv_tokens=256) as loaded:
        assert relative_error(np.array(loaded.logits(ids)), Stepper(graph).step({0: ids})[0]) < 1e-3
