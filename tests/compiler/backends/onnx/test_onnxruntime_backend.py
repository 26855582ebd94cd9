"""Engines of the backend `onnxruntime`: built, inspected, planned, refused; accuracy beside the kernels of TVM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime")

from belle_compile.compiler import backends, inspection, targets
from belle_compile.compiler.accuracy import Comparison
from belle_compile.compiler.driver import BuildRequest, build
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.plan.table import Load, plan
from belle_compile.runtime import Engine
from belle_compile.runtime.artifact import read_manifest
from belle_compile.runtime.errors import EngineError
from tests import kernel_cache
from tests.parity.engines import Builder
from tests.parity.variants import hf_logits

kernel_cache.install()

FIXTURE = Path(__file__).parents[3] / "fixtures" / "tiny-bloom-trained"
WINDOW = 192


@pytest.fixture(scope="module")
def checkpoint(builder: Builder) -> Path:
    return builder.checkpoint("llama_gqa")


@pytest.fixture(scope="module")
def engine(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(BuildRequest(checkpoint, tmp_path_factory.mktemp("engines") / "int8", backend="onnxruntime"))


def test_devices() -> None:
    assert backends.choose(targets.parse("cpu").device).name == "tvm", "the default stays"
    listed = {device["name"]: device["backends"] for device in targets.listing()}
    assert listed["cpu"][:2] == ["tvm", "onnxruntime"]
    assert listed["arm64"][0] == "onnxruntime"
    gpus = ("a100-40g", "a100-80g", "h100", "h200", "l40s", "rtx3090", "rtx4090", "rtx5090", "t4")
    assert all("onnxruntime" in listed[name][1:] for name in gpus), "the default stays"


def test_the_engine_says_what_it_is(engine: Path) -> None:
    found = inspection.inspect(engine)
    target = found["target"]
    assert target["backend"] == "onnxruntime" and target["requires"]["isa"] == ["vnni"] and "onnx" in found["toolchain"]
    assert {name for name in found["files"] if name.startswith("rank0/")} == {"rank0/model.onnx", "rank0/weights.safetensors"}
    assert found["quantization"]["scheme"] == "w8a8" and found["quantization"]["kv_cache"] == "float32"
    assert found["kernel_calls"]["before"] >= found["kernel_calls"]["after"] > 0
    assert {"fuse-projections", "fuse-add-norm"} <= {record["name"] for record in found["passes"]}
    assert inspection.verify(engine)["files"] == len(found["files"])


def test_golden_answers(engine: Path) -> None:
    with Engine.load(engine, threads=2, verify="full") as loaded:
        assert loaded.self_test() is not None
    golden = json.loads((engine / "selftest.json").read_text())
    assert golden["answers"] or golden["reason"]


def test_two_builds_give_the_same_bytes(engine: Path, checkpoint: Path, tmp_path: Path) -> None:
    again = build(BuildRequest(checkpoint, tmp_path / "again", backend="onnxruntime"))
    assert (again / "manifest.json").read_bytes() == (engine / "manifest.json").read_bytes()


def test_memory_is_the_same_in_the_plan_and_in_the_manifest(engine: Path, checkpoint: Path) -> None:
    context = min(2048, read_manifest(engine).model.dimensions["max_position"])
    one, two, *_ = plan(checkpoint, "cpu", "int8", Load(1, context), backend="onnxruntime")["plan"]
    assert one["needed_bytes"] == read_manifest(engine).target.requires.memory_bytes
    assert one["token_s"] is None, "nothing is known of its speed"
    assert "several ranks" in two["refused"]


def test_an_engine_for_arm_is_built_and_refused_here(checkpoint: Path, tmp_path: Path) -> None:
    out = build(BuildRequest(checkpoint, tmp_path / "arm", target="arm64", drift=False))
    manifest = read_manifest(out)
    assert (manifest.target.backend, manifest.target.requires.arch) == ("onnxruntime", "aarch64")
    assert json.loads((out / "selftest.json").read_text()), "computed by the meanings"
    with pytest.raises(EngineError, match=r"this host cannot run the engine built for arm64: found Linux x86_64"):
        Engine.load(out)


@pytest.fixture(scope="module")
def gpu_engine(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("engines") / "gpu"
    return build(BuildRequest(checkpoint, out, target="a100", backend="onnxruntime", drift=False))


def test_an_engine_for_gpus_says_what_it_needs(gpu_engine: Path) -> None:
    found = inspection.inspect(gpu_engine)
    assert found["target"]["isas"] == found["target"]["requires"]["isa"] == ["cuda"] and not found["target"]["requires"]["arch"]
    assert {name for name in found["files"] if name.startswith("rank0/")} == {"rank0/model.onnx", "rank0/weights.safetensors"}
    assert found["quantization"]["scheme"] == "w8a8" and found["quantization"]["kv_cache"] == "float16"
    assert json.loads((gpu_engine / "selftest.json").read_text()), "computed by the meanings"


def test_an_engine_for_gpus_needs_what_its_plan_says(gpu_engine: Path, checkpoint: Path) -> None:
    manifest = read_manifest(gpu_engine)
    context = min(2048, manifest.model.dimensions["max_position"])
    one, two, *_ = plan(checkpoint, "a100", "int8", Load(1, context), backend="onnxruntime")["plan"]
    assert one["needed_bytes"] == manifest.target.requires.memory_bytes and one["fits"]
    assert "several ranks" in two["refused"]
    token = one["kv_bytes"] // context
    assert one["workspace_bytes"] > 8 * context * token, "8 sequences have a place for the longest one, running or not"


def test_a_host_without_the_provider_is_told(gpu_engine: Path) -> None:
    message = r"^engine: this host cannot run the engine built for a100-40g: found ONNX Runtime with .*CPUExecutionProvider, "
    with pytest.raises(
        EngineError, match=message + r"expected CUDAExecutionProvider of onnxruntime-gpu 1\.31 or later; uninst"
    ):
        Engine.load(gpu_engine)


def test_int8_is_as_accurate_as_the_kernels_of_tvm(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    text = (FIXTURE / "heldout-en.txt").read_text(encoding="utf-8")
    ids = Tokenizer.from_file(str(FIXTURE / "tokenizer.json")).encode(text).ids[: 2 * WINDOW]
    windows = [ids[:WINDOW], ids[WINDOW:]]
    expected = [torch.from_numpy(hf_logits(FIXTURE, window)) for window in windows]
    found = {}
    for backend, isas in (("tvm", ("avx2",)), ("onnxruntime", ())):
        out = build(BuildRequest(FIXTURE, tmp_path / backend, backend=backend, isas=isas, drift=False))
        comparison = Comparison()
        with Engine.load(out, threads=2, kv_tokens=2 * WINDOW) as engine:
            for window, logits in zip(windows, expected, strict=True):
                comparison.add(logits, torch.from_numpy(np.array(engine.logits(window))), window)
        found[backend] = comparison.means()
    assert found["onnxruntime"]["kl"] <= 1.1 * found["tvm"]["kl"], found
    assert found["onnxruntime"]["top1_agreement"] >= found["tvm"]["top1_agreement"] - 0.01, found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"quantization": "int4"},
            r"^backend: onnxruntime cannot build this for cpu: found weights int4 .*; use --backend tvm or torchscript\.$",
        ),
        ({"target": "cpux2"}, r"found several ranks, where ONNX Runtime runs in one process; use --backend tvm\.$"),
        ({"target": "a100x2"}, r"found several ranks, where ONNX Runtime runs in one process; use --backend triton\.$"),
        (
            {"target": "a100", "quantization": "int4"},
            r"for a100-40g: found weights int4 in groups of .*; choose another --quant",
        ),
        ({"target": "a100", "isas": ("sm_80",)}, r"^target: instruction set of a100-40g: found sm_80, expected cuda\.$"),
        (
            {"target": "h100", "kv_cache": "float32"},
            r"^kv cache: type under ONNX Runtime on h100: found float32, expected float16; use --kv-cache float16\.$",
        ),
        ({"kv_cache": "float16"}, r"^kv cache: type under ONNX Runtime on cpu: found float16, expected float32; use --kv-ca"),
        ({"target": "arm64x2"}, r"^target: ranks of arm64: found 2, expected 1 to 1\.$"),
        ({"target": "arm64", "backend": "tvm"}, r"^backend: backend for arm64: found tvm, expected onnxruntime\b.*; see"),
        (
            {"kv_cache": "bfloat16"},
            r"^kv cache: unknown type for the backend onnxruntime: found 'bfloat16', expected auto",
        ),
        ({"tune": True}, r"found no kernels to measure"),
        ({"isas": ("avx2",)}, r"^target: instruction set of cpu: found avx2, expected vnni\.$"),
    ],
)
def test_what_it_cannot_do_is_refused(changes: dict[str, Any], message: str, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CompileError, match=message):
        build(BuildRequest(checkpoint, tmp_path / "engine", **{"backend": "onnxruntime"} | changes))
    assert not list(tmp_path.iterdir())
