"""Engines made of engines: the bytes that a build gives, whatever the numbers of ranks, and what cannot be done."""

from __future__ import annotations

from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from belle_compile.compiler.backends.program.lowering import pack_vector
from belle_compile.compiler.backends.tvm import TvmBackend, packing
from belle_compile.compiler.driver import BuildRequest, build
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.ir.text import from_onnx, to_onnx, to_text
from belle_compile.compiler.repartition import RepartitionRequest, repartition
from belle_compile.compiler.unpacking import WholeWeights
from belle_compile.passes.pipeline import at_fusion, run_pipeline
from belle_compile.passes.rotation import rotate_activations
from belle_compile.runtime.artifact import read_manifest, verify_files
from belle_compile.runtime.errors import EngineError
from tests.compiler.engines import write_engine
from tests.parity.variants import make_bloom, make_llama
from tests.passes.helpers import bloom
from tests.pipelines import PIPELINES

# Room for blocks of a rotation and groups of INT4 weights on every rank; shares are uneven
SIZES: dict[str, Any] = {
    "bloom": (make_bloom, {"hidden_size": 160, "n_head": 5, "n_layer": 1}),
    "llama": (
        make_llama,
        {"hidden_size": 72, "intermediate_size": 400, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 128,
         "num_hidden_layers": 1, "attention_bias": True, "mlp_bias": True},
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=SIZES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    make, sizes = SIZES[request.param]
    made: Path = make(tmp_path_factory.mktemp("checkpoints") / request.param, **sizes)
    return made


@pytest.fixture(autouse=True)
def same_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds for several ranks rotate in the blocks that one for one rank has, as wherever these can be shared evenly."""
    monkeypatch.setattr(rotate_activations, "_UNEVEN", inf)


def rank_files(engine: Path) -> dict[str, bytes]:
    """Everything but manifest and report."""
    files = {str(path.relative_to(engine)): path.read_bytes() for path in engine.rglob("*") if path.is_file()}
    return {name: content for name, content in files.items() if name not in ("manifest.json", "report.html")}


def assert_same(found: Path, expected: Path) -> None:
    files, wanted = rank_files(found), rank_files(expected)
    assert files.keys() == wanted.keys()
    assert [name for name in files if files[name] != wanted[name]] == []


@pytest.mark.parametrize("preset", PIPELINES)
def test_the_bytes_of_a_build(checkpoint: Path, preset: str, tmp_path: Path, no_kernels: None) -> None:
    """From one rank to two, from two to one and, where a rank has a part, to three."""
    one, two, three = (tmp_path / f"x{ranks}" for ranks in (1, 2, 3))
    for ranks, out in ((1, one), (2, two)):
        build(BuildRequest(checkpoint, out, quantization=preset, target=f"cpux{ranks}", drift=False))
    assert_same(repartition(RepartitionRequest(one, tmp_path / "1to2", "cpux2")), two)
    assert_same(repartition(RepartitionRequest(two, tmp_path / "2to1", "cpu")), one)
    if (preset, checkpoint.name) == ("int4", "bloom"):
        with pytest.raises(CompileError, match="key/value heads for 3 ranks"):
            repartition(RepartitionRequest(two, three, "cpux3"))
        return
    build(BuildRequest(checkpoint, three, quantization=preset, target="cpux3", drift=False))
    assert_same(repartition(RepartitionRequest(two, tmp_path / "2to3", "cpux3")), three)


def test_the_manifest(checkpoint: Path, tmp_path: Path, no_kernels: None) -> None:
    one = build(BuildRequest(checkpoint, tmp_path / "one", isas=("avx2",), drift=False))
    made = repartition(RepartitionRequest(one, tmp_path / "made", "cpux2"))
    found = read_manifest(made)
    verify_files(made, found, full=True)
    expected = read_manifest(build(BuildRequest(checkpoint, tmp_path / "two", target="cpux2", isas=("avx2",), drift=False)))
    for records in (found.passes, expected.passes):
        (rotation,) = (record for record in records if record.name == "rotate-activations")
        assert rotation.options.pop("ranks") == (1 if records is found.passes else 2), "as it was built"
    assert [vars(record) for record in found.passes] == [vars(record) for record in expected.passes]
    for field in ("model", "target", "quantization", "kernel_calls", "toolchain", "generation"):
        assert getattr(found, field) == getattr(expected, field), field
    page = (made / "report.html").read_text(encoding="utf-8")
    assert page.count("made from an engine for other ranks") == 4 and "without the model" in page
    assert "built without" not in page


def test_real_kernels(checkpoint: Path, tmp_path: Path) -> None:
    two = build(BuildRequest(checkpoint, tmp_path / "two", quantization="none", target="cpux2", isas=("avx2",), drift=False))
    one = build(BuildRequest(checkpoint, tmp_path / "one", quantization="none", isas=("avx2",), drift=False))
    assert_same(repartition(RepartitionRequest(one, tmp_path / "made", "cpux2")), two)


def test_what_cannot_be_done(checkpoint: Path, tmp_path: Path, no_kernels: None) -> None:
    older = write_engine(tmp_path / "older")
    with pytest.raises(
        CompileError, match=r"^repartition: engine .*older: found no graph\.onnx; build it again from its checkpoint"
    ):
        repartition(RepartitionRequest(older, tmp_path / "out", "cpux2"))
    with pytest.raises(EngineError, match="is not an engine"):
        repartition(RepartitionRequest(tmp_path, tmp_path / "out", "cpux2"))
    engine = build(BuildRequest(checkpoint, tmp_path / "engine", drift=False))
    weights = bytearray((engine / "rank0/weights.safetensors").read_bytes())
    weights[-1] ^= 1
    (engine / "rank0/weights.safetensors").write_bytes(weights)
    with pytest.raises(EngineError, match="digest of rank0/weights"):
        repartition(RepartitionRequest(engine, tmp_path / "out", "cpux2"))
    assert not (tmp_path / "out").exists()


def test_a_graph_survives_onnx() -> None:
    model = bloom()
    run_pipeline(model, at_fusion(PIPELINES["int8"])[0])
    weights = WholeWeights(Path("engine"), TvmBackend())
    loaded = from_onnx(to_onnx(model), weights.tensor)
    assert to_text(loaded) == to_text(model), "floats keep all their digits"
    assert to_onnx(loaded) == to_onnx(model)
    with pytest.raises(CompileError, match=r"^repartition: weights of engine: found no .*, expected all weights of its graph"):
        weights.find([])


@pytest.mark.parametrize("shape", [(5, 7), (37, 130), (64, 256)])
def test_unpacking(shape: tuple[int, int]) -> None:
    random = np.random.default_rng(1)
    int8, floats = random.integers(-127, 128, shape, np.int8), random.standard_normal(shape).astype(np.float32)
    int4, scales = random.integers(-8, 8, shape, np.int8), random.random(shape).astype(np.float16)
    for packed, expected, dtype in (
        (packing.pack_int8(int8), int8, "int8"), (packing.pack_float(floats), floats, "float32"),
        (packing.pack_int4(int4), int4, "int4"), (packing.pack_int6(int8 >> 2), int8 >> 2, "int8"),
        (packing.pack_group_scales(scales), scales, "float16"),
        (pack_vector(floats[0]), floats[0], "float32"),
    ):  # fmt: skip
        np.testing.assert_array_equal(TvmBackend().unpack(packed, expected.shape, dtype), expected)
