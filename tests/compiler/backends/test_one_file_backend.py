"""A backend of one file is built, inspected, verified, loaded, served, and refused where it must be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from belle_compile.compiler import backends, inspection, targets
from belle_compile.compiler.driver import BuildRequest, build
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.plan.table import Load, plan
from belle_compile.compiler.repartition import RepartitionRequest, repartition
from belle_compile.runtime import Engine, SamplingParams
from belle_compile.runtime.artifact import read_manifest
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.executors.kv_memory import KvMemory
from tests import kernel_cache
from tests.compiler.backends import numpy_backend
from tests.compiler.report.pages import Page
from tests.parity.stepping import relative_error
from tests.parity.variants import VARIANTS, random_ids

kernel_cache.install()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return VARIANTS["llama_gqa"](tmp_path_factory.mktemp("checkpoints") / "tiny-llama")


@pytest.fixture(scope="module")
def engine(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(BuildRequest(checkpoint, tmp_path_factory.mktemp("engines") / "numpy", quantization="none", backend="numpy"))


def test_it_serves_what_the_device_is_known_for() -> None:
    serving = [backend.name for backend in backends.serving(targets.parse("cpu").device)]
    assert serving[0] == "tvm" and serving[-1] == "numpy"
    assert backends.choose(targets.parse("cpu").device).name == "tvm", "the default stays the one registered first"
    listed = {device["name"]: device["backends"] for device in targets.listing()}
    assert listed["cpu"] == serving and "numpy" not in listed["h100"]


def test_the_engine_says_what_it_is(engine: Path) -> None:
    found = inspection.inspect(engine)
    assert found["target"]["backend"] == "numpy" and "kernels" not in found
    assert {name for name in found["files"] if name.startswith("rank0/")} == {"rank0/model.onnx", "rank0/weights.safetensors"}
    assert found["kernel_calls"]["before"] > found["kernel_calls"]["after"] > 0
    assert inspection.verify(engine)["files"] == len(found["files"])
    fused = [record["name"] for record in found["passes"] if record["name"].startswith("fuse-")]
    assert fused == ["fuse-projections"], "the backend does not carry the others"
    memory = Page((engine / "report.html").read_text()).text("memory")
    assert "all weights" in memory and "the executor places them itself" in memory


def test_memory_is_the_same_in_the_plan_and_in_the_manifest(engine: Path, checkpoint: Path) -> None:
    context = min(2048, read_manifest(engine).model.dimensions["max_position"])
    found = plan(checkpoint, "cpu", "none", Load(1, context), backend="numpy")
    assert found["backend"] == "numpy" and found["rates"] == ""
    one, two, *_ = found["plan"]
    assert one["needed_bytes"] == read_manifest(engine).target.requires.memory_bytes
    assert one["token_s"] is None, "nothing is known of its speed"
    assert "several ranks, where it runs in one process" in two["refused"]


def test_several_sequences_get_the_answers_of_another_backend(engine: Path, checkpoint: Path, tmp_path: Path) -> None:
    other = build(BuildRequest(checkpoint, tmp_path / "tvm", quantization="none", isas=("avx2",), drift=False))
    lengths = (60, 3, 17, 30, 1)  # more sequences than a step has, and tokens than it takes
    prompts = [random_ids(checkpoint, length, seed) for seed, length in enumerate(lengths)]
    params = SamplingParams(temperature=0, max_new_tokens=12, ignore_eos=True)
    with Engine.load(engine) as ours, Engine.load(other) as theirs:
        for ids in prompts[:2]:
            assert relative_error(ours.logits(ids), theirs.logits(ids)) < 1e-5
        answers = [[result.token_ids for result in one.generate(prompts, params)] for one in (ours, theirs)]
        assert answers[0] == answers[1]
        with pytest.raises(EngineError, match="cannot be profiled"), ours.profile():
            pass


@pytest.mark.parametrize("kv_cache", ["float32", "int8"])
def test_integers_and_types_of_the_kv_cache(kv_cache: str, engine: Path, checkpoint: Path, tmp_path: Path) -> None:
    out, other = (
        build(BuildRequest(checkpoint, tmp_path / name, backend=name, methods=("rotate",), kv_cache=kv_cache, drift=False))
        for name in ("numpy", "tvm")
    )
    assert read_manifest(out).quantization == read_manifest(other).quantization
    ids = random_ids(checkpoint, 40, 3)
    with Engine.load(out) as ours, Engine.load(other) as theirs, Engine.load(engine) as floats:
        logits = ours.logits(ids)
        assert relative_error(logits, theirs.logits(ids)) < 0.5 * relative_error(logits, floats.logits(ids)), (
            "the same integers"
        )
    assert (out / "rank0/weights.safetensors").stat().st_size < (engine / "rank0/weights.safetensors").stat().st_size / 2


def test_the_same_request_gives_the_same_bytes(engine: Path, checkpoint: Path, tmp_path: Path) -> None:
    again = build(BuildRequest(checkpoint, tmp_path / "again", quantization="none", backend="numpy"))
    assert (again / "manifest.json").read_bytes() == (engine / "manifest.json").read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"quantization": "int8"},
            r"^backend: numpy cannot build this for cpu: found no support for the method rotate-online \(supported: rotate\); "
            r"use --backend tvm( or \w+)*\.$",
        ),
        (
            {"target": "a100x1"},
            r"^backend: backend for a100-40g: found numpy, expected triton or tensorrt or onnxruntime; see `belle",
        ),
        (
            {"target": "cpux2", "quantization": "none"},
            r"found several ranks, where it runs in one process; use --back",
        ),
        ({"backend": "pandas"}, r"^backend: unknown backend: found 'pandas', expected tvm or triton( or \w+)* or numpy\.$"),
        (
            {"kv_cache": "int4", "quantization": "none"},
            r"^kv cache: unknown type for the backend numpy: found 'int4'",
        ),
        (
            {"tune": True, "quantization": "none"},
            r"^target: tuning for cpu: found no kernels to measure; build wi",
        ),
    ],
)
def test_what_it_cannot_do_is_refused(changes: dict[str, Any], message: str, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CompileError, match=message):
        build(BuildRequest(checkpoint, tmp_path / "engine", **{"backend": "numpy"} | changes))
    assert not list(tmp_path.iterdir())


def test_an_engine_whose_weights_cannot_be_read_back(engine: Path, tmp_path: Path) -> None:
    with pytest.raises(CompileError, match=r"found weights of the backend numpy, which cannot be read back; build it again"):
        repartition(RepartitionRequest(engine, tmp_path / "out", "cpux2"))
    assert not list(tmp_path.iterdir())


def test_weights_lie_on_whole_cache_lines(engine: Path) -> None:
    loaded = numpy_backend.NumpyExecutor(engine / "rank0", KvMemory(64))
    assert loaded.num_blocks == 4 and loaded.batch.max_tokens == numpy_backend.STEP_TOKENS
    batch = loaded.batch
    batch.tokens, batch.rows = 1, 0
    assert loaded.step(batch).shape == (0, loaded.vocab_size), "a step that wants no logits"
    np.testing.assert_array_equal(batch.logit_rows, 0)
