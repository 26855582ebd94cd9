"""Engines for TensorRT: built, inspected, refused on a host without a GPU, and what is refused before work starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from belle_compile.compiler import backends, inspection, targets
from belle_compile.compiler.cli.rows import engine_rows
from belle_compile.compiler.driver import BuildRequest, build
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.plan.table import Load, plan
from belle_compile.runtime.artifact import read_manifest
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.executors.tensorrt_plan import facts_schema, read_facts
from tests.parity.variants import VARIANTS

pytest.importorskip("tensorrt_rtx", reason="the extra `tensorrt` is not installed")

W8A8 = ("rotate", "rotate-online", "static")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return VARIANTS["llama_theta"](tmp_path_factory.mktemp("checkpoints") / "tiny-llama")


@pytest.fixture(scope="module")
def engine(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    messages = [{"messages": [{"role": "user", "content": f"helo the world {number}"}]} for number in range(20)]
    (folder / "requests.jsonl").write_text("\n".join(map(json.dumps, messages)))
    request = BuildRequest(
        checkpoint, folder / "w8a8", target="rtx4090", backend="tensorrt", methods=W8A8, gate=None, drift=False,
        calibration=folder / "requests.jsonl",
    )  # fmt: skip
    return build(request)


def test_devices_with_a_compute_capability_that_tensorrt_knows() -> None:
    backend = backends.get("tensorrt")
    served = {device["name"]: device["backends"] for device in targets.listing() if "tensorrt" in device["backends"]}
    assert served.keys() >= {"a100-40g", "h100", "l40s", "rtx3090", "rtx4090", "rtx5090", "t4"} and "cpu" not in served
    assert served["t4"][0] == "tensorrt" and served["a100-40g"][0] == "triton", "the default of a device stays"
    assert backend.isas(targets.parse("rtx5090").device) == ("sm_120",)


def test_an_engine_describes_its_layers(engine: Path) -> None:
    found = inspection.inspect(engine)
    answers, prompts = found["layers"]["answers"], found["layers"]["prompts"]
    assert answers["int8_products"] == prompts["int8_products"] == 9 and answers["float_products"] == 0
    assert found["kernel_calls"]["after"] == sum(answers.values()) < found["kernel_calls"]["before"]
    assert found["quantization"]["activations"] == "int8, one scale for all tokens"
    assert found["toolchain"]["tensorrt-rtx"] == read_facts(engine / "rank0").version
    assert {name for name in found["files"] if name.startswith("rank0/")} == {"rank0/engine.plan", "rank0/tensorrt.json"}
    assert found["bytes_by_part"]["plan"] == read_facts(engine / "rank0").plan_bytes
    assert dict(engine_rows(found))["layers of answers"].startswith("2 attention, 9 int8 products, ")
    assert set(facts_schema()["properties"]) >= {"library", "version", "arch", "layers"}  # type: ignore[call-overload]


def test_a_host_without_a_driver_says_so(engine: Path) -> None:
    with pytest.raises(EngineError, match=r"^cuda: no NVIDIA driver on this host: found no libcuda"):
        inspection.verify(engine)


def test_16_bits_are_float16(checkpoint: Path, tmp_path: Path) -> None:
    out = build(BuildRequest(checkpoint, tmp_path / "w8a16", "t4", "int8-accurate", ("rotate",), drift=False))
    manifest = read_manifest(out)
    assert manifest.quantization["activations"] == manifest.quantization["kv_cache"] == "float16"
    assert inspection.inspect(out)["layers"]["prompts"]["int8_weight_products"] > 0
    one, two, *_ = plan(checkpoint, "t4", "int8-accurate", Load(1, 128), backend="tensorrt")["plan"]
    assert one["needed_bytes"] == manifest.target.requires.memory_bytes, "before and after the build"
    assert "several ranks, where an engine for TensorRT" in two["refused"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"target": "a100"},
            r"^backend: tensorrt cannot build this for a100-40g: found a scale for the activations of each token, .*: add "
            r"static to --methods, or take int8-accurate, .*; use --backend triton or onnxruntime\.$",
        ),
        ({"quantization": "int4"}, r"found weights int4 in groups of 128 inputs, int8 embedding and head, where Ten"),
        ({"target": "rtx4090x2", "quantization": "none"}, r"found several ranks, where an engine for TensorRT runs on one GPU"),
        ({"target": "h100", "quantization": "none"}, r"^tensorrt: the Python package tensorrt is not installed; pip install"),
        ({"target": "t4"}, r"found products of INT8 activations, which TensorRT has no kernels for on sm_75: take int8-acc"),
        (
            {"target": "t4", "quantization": "none", "kv_cache": "float32"},
            r"^kv cache: float32 on sm_75, where TensorRT has no kernels for it: found float32, expected float16; use",
        ),
        ({"target": "cpu", "quantization": "none"}, r"^backend: backend for cpu: found tensorrt, expected tvm"),
        ({"kv_cache": "int8", "quantization": "none"}, r"unknown type for the backend tensorrt: found 'int8', expected auto"),
    ],
)  # fmt: skip
def test_what_it_cannot_build_is_refused(changes: dict[str, object], message: str, checkpoint: Path, tmp_path: Path) -> None:
    request = {"checkpoint": checkpoint, "output": tmp_path / "engine", "backend": "tensorrt", "target": "rtx4090"} | changes
    with pytest.raises(CompileError, match=message):
        build(BuildRequest(**request))  # type: ignore[arg-type]
    assert not (tmp_path / "engine").exists()
