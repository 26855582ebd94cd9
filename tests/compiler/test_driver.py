"""A build end to end, with kernels stood in for by a few bytes: compiling them takes long and has its own tests."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from math import prod
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import load_file

from belle_compile.compiler import inspection
from belle_compile.compiler.backends import CompileOptions, Payload
from belle_compile.compiler.backends.tvm import TvmBackend
from belle_compile.compiler.backends.tvm.isa import AVX2
from belle_compile.compiler.backends.tvm.library import compile_library
from belle_compile.compiler.cli.rows import engine_rows
from belle_compile.compiler.devices import Target
from belle_compile.compiler.driver import BuildRequest, build
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.kv_types import KV_TYPES
from belle_compile.compiler.plan.table import Load, plan
from belle_compile.compiler.reading import Reading
from belle_compile.compiler.report.effects import TOKENS
from belle_compile.runtime.artifact import Manifest, read_manifest, verify_files
from belle_compile.runtime.program_json import read_program
from tests.compiler.conftest import TUNED
from tests.compiler.report.pages import Page
from tests.parity.variants import VARIANTS
from tests.pipelines import PIPELINES

pytestmark = pytest.mark.usefixtures("no_kernels")


@pytest.fixture(scope="module")
def bloom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return VARIANTS["bloom"](tmp_path_factory.mktemp("checkpoints") / "tiny-bloom")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return VARIANTS["llama_gqa"](tmp_path_factory.mktemp("checkpoints") / "tiny-llama")


def manifest_of(request: BuildRequest) -> Manifest:
    return read_manifest(build(request))


@pytest.mark.parametrize("quantization", PIPELINES)
@pytest.mark.parametrize("family", ["bloom", "llama"])
def test_the_engine_is_whole_and_says_what_it_is(
    family: str, quantization: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    checkpoint = request.getfixturevalue(family)
    out = tmp_path / "engine"
    manifest = manifest_of(BuildRequest(checkpoint, out, quantization=quantization))
    verify_files(out, manifest, full=True)
    config = json.loads((checkpoint / "config.json").read_text())
    assert (manifest.model.family, manifest.model.name) == (family, f"tiny-{family}")
    assert manifest.model.dimensions["hidden_size"] == config["hidden_size"]
    assert manifest.model.dimensions["vocab_size"] == config["vocab_size"]
    assert manifest.model.source_digests["config.json"] == hashlib.sha256((checkpoint / "config.json").read_bytes()).hexdigest()
    assert [record.name for record in manifest.passes] == ["open-checkpoint", *(step.name for step in PIPELINES[quantization])]
    assert manifest.prompt_template.name == f"belle-{family}"
    assert (manifest.special_tokens.bos, manifest.special_tokens.eos) == (1, (2,))
    schemes = {"none": "none", "int8-accurate": "w8a16", "int4": "w4a8"}
    assert manifest.quantization["scheme"] == schemes.get(quantization, "w8a8")
    assert manifest.kernel_calls.before > manifest.kernel_calls.after > 0
    assert manifest.target.requires.memory_bytes > sum(record.bytes for record in manifest.files.values())
    program = read_program(out / "rank0")
    assert len(program.calls) == manifest.kernel_calls.after
    weights = load_file(out / "rank0" / "weights.safetensors")
    assert set(weights) == set(program.weight_names())
    assert any(array.dtype == np.int8 for array in weights.values()) == (quantization != "none")


@pytest.mark.parametrize(
    ("quantization", "asked", "dtype"),
    [("int8", "auto", "bfloat16"), ("none", "auto", "float32"), ("int8", "int8", "int8"), ("none", "float16", "float16")],
)
def test_the_type_of_the_kv_cache(llama: Path, tmp_path: Path, quantization: str, asked: str, dtype: str) -> None:
    out = tmp_path / "engine"
    manifest = manifest_of(BuildRequest(llama, out, quantization=quantization, kv_cache=asked))
    assert manifest.quantization["kv_cache"] == KV_TYPES[dtype].manifest
    assert read_program(out / "rank0").kv.dtype == dtype


def test_a_bfloat16_cache_is_refused_for_gpus(llama: Path, tmp_path: Path) -> None:
    found = r"^kv cache: unknown type for the backend triton: found 'bfloat16', expected auto or float32 or float16 or int8\.$"
    with pytest.raises(CompileError, match=found):
        build(BuildRequest(llama, tmp_path / "engine", "a100x1", kv_cache="bfloat16"))
    assert not (tmp_path / "engine").exists()


def test_an_unknown_kv_cache_is_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CompileError, match=r"^kv cache: unknown type for the backend tvm: found 'int4', expected auto or float"
    ):
        build(BuildRequest(llama, tmp_path / "engine", kv_cache="int4"))


@pytest.mark.parametrize(("target", "quantization"), [("cpu", "int8"), ("cpux2", "none")])
def test_the_plan_and_the_manifest_say_the_same_memory(llama: Path, target: str, quantization: str, tmp_path: Path) -> None:
    manifest = manifest_of(BuildRequest(llama, tmp_path / "engine", target, quantization, drift=False))
    load = Load(1, min(2048, manifest.model.dimensions["max_position"]))
    (line,) = (line for line in plan(llama, target, quantization, load)["plan"] if line["ranks"] == manifest.target.ranks)
    parts = [line[f"{part}_bytes"] for part in ("weight", "kv", "workspace", "reserve")]
    requires = manifest.target.requires
    assert line["needed_bytes"] == requires.memory_bytes == sum(parts)
    assert line["resident_bytes"] == requires.resident_bytes == sum(parts[1:]), "the executor maps the weights"


def test_what_a_backend_does_not_carry_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    nowhere = tmp_path / "missing"
    message = r"^backend: triton cannot build this for h100: found int4 weights, for which it has no kernel; "
    with pytest.raises(CompileError, match=message):
        build(BuildRequest(nowhere, tmp_path / "engine", "h100", "int4"))
    with pytest.raises(CompileError, match=r"^target: tuning for h100: found nothing to measure: the host that serves chooses"):
        build(BuildRequest(nowhere, tmp_path / "engine", "h100", tune=True))
    with pytest.raises(CompileError, match=r"^backend: backend for cpu: found triton, expected tvm"):
        build(BuildRequest(nowhere, tmp_path / "engine", backend="triton"))
    with pytest.raises(CompileError, match=r"^backend: unknown backend: found 'cuda', expected tvm or triton"):
        build(BuildRequest(nowhere, tmp_path / "engine", backend="cuda"))
    assert not list(tmp_path.iterdir())


def test_parameters_count_a_tied_head_once(bloom: Path, tmp_path: Path) -> None:
    tensors = load_file(bloom / "model.safetensors")
    untied = {name: array for name, array in tensors.items() if name != "lm_head.weight"}
    parameters = sum(prod(array.shape) for array in untied.values())
    assert manifest_of(BuildRequest(bloom, tmp_path / "engine")).model.parameters == parameters


def test_the_same_checkpoint_gives_the_same_bytes(llama: Path, tmp_path: Path) -> None:
    first, second = (build(BuildRequest(llama, tmp_path / name)) for name in ("a", "b"))
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert len(files) == 10
    for file in files:
        assert (first / file).read_bytes() == (second / file).read_bytes(), file


def test_stages_are_told_and_dumped(llama: Path, tmp_path: Path) -> None:
    heard: list[tuple[str, int, int]] = []
    build(BuildRequest(llama, tmp_path / "engine", dump_ir=tmp_path / "ir", on_progress=lambda *told: heard.append(told)))
    assert list(dict.fromkeys(stage for stage, _, _ in heard)) == [
        "open", "digest", "optimize", "drift", "compile", "weights", "self-test",
    ]  # fmt: skip
    for stage in ("digest", "drift", "weights"):
        done = [(done, total) for name, done, total in heard if name == stage]
        assert done == sorted(done) and done[-1][0] == done[-1][1] > 0
    dumped = sorted(path.name for path in (tmp_path / "ir").glob("*.txt"))
    assert dumped == ["00-frontend.txt", *(f"{i:02d}-{step.name}.txt" for i, step in enumerate(PIPELINES["int8"], 1))]


@pytest.mark.parametrize(("target", "ranks"), [("cpu", [""]), ("cpux2", ["rank 0: ", "rank 1: "])])
def test_weights_are_described_back_to_the_checkpoint(llama: Path, tmp_path: Path, target: str, ranks: list[str]) -> None:
    lines: list[str] = []
    build(BuildRequest(llama, tmp_path / "engine", target, drift=False, on_weight=lines.append))
    layer = "model.layers.0.mlp"
    steps = {name: rf"int8 <- rotated <- model\.safetensors: {layer}\.{name}_proj\.weight" for name in ("gate", "up")}
    for rank in ranks:
        part = r"rows \d+:\d+ <- " if rank else ""
        (line,) = [line for line in lines if line.startswith(f"{rank}{layer}.gate_proj+up_proj.weight.rotated.int8 <- ")]
        assert re.fullmatch(rf"\S.*int8 <- \({part}{steps['gate']}; {part}{steps['up']}\)", line)


def test_options_reach_the_manifest(llama: Path, tmp_path: Path) -> None:
    manifest = manifest_of(BuildRequest(llama, tmp_path / "engine", template="raw", isas=("avx2",)))
    assert manifest.prompt_template.name == "raw"
    assert manifest.target.isas == manifest.target.requires.isa == ("avx2",)
    assert {name for name in manifest.files if "kernels-" in name} == {"rank0/kernels-avx2.so"}
    assert manifest.passes[0].options == {"template": "raw"}


def test_tuning_is_recorded_where_it_was_asked_for(llama: Path, tmp_path: Path) -> None:
    heard: list[tuple[str, int, int]] = []
    plain = manifest_of(BuildRequest(llama, tmp_path / "plain"))
    assert "tune-kernels" not in [record.name for record in plain.passes]
    assert plain.toolchain["kernel tilings"] == "avx2: built-in"
    request = BuildRequest(llama, tmp_path / "tuned", tune=True, on_progress=lambda *told: heard.append(told))
    manifest = manifest_of(request)
    record = manifest.passes[-1]
    assert (record.name, record.changes, record.refusals) == ("tune-kernels", 1, ())
    assert record.options == TUNED.to_plain()
    assert manifest.toolchain["kernel tilings"] == "avx2: measured"
    assert ("tune", 1, 1) in heard
    rows = dict(engine_rows(inspection.inspect(tmp_path / "tuned")))
    assert rows["tuned 96x64, 1 row"] == "2x2, prefetch 2048: 1 row 9 us (-10%)"
    assert rows["tuned 96x64, 2 rows or more"] == "2x2"


def test_what_does_not_fit_leaves_nothing(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = "expected int8 or int8-accurate or int8-plain or int4 or none"
    with pytest.raises(CompileError, match=f"^quantization: unknown preset: found 'int3', {expected}"):
        build(BuildRequest(llama, tmp_path / "engine", quantization="int3"))
    with pytest.raises(CompileError, match=r"^checkpoint: path .*: found nothing there"):
        build(BuildRequest(tmp_path / "missing", tmp_path / "engine"))

    def full(backend: TvmBackend, graphs: list[ir.Model], target: Target, options: CompileOptions) -> list[Payload]:
        raise CompileError("tvm", "op Conv", found="no kernel")

    monkeypatch.setattr(TvmBackend, "compile", full)
    with pytest.raises(CompileError, match=r"^tvm: op Conv"):
        build(BuildRequest(llama, tmp_path / "engine"))
    assert list(tmp_path.iterdir()) == []


def test_without_a_c_compiler_the_build_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(CompileError, match=r"^tvm: no C compiler to link the kernels with; install one, .*apt install gcc"):
        compile_library([], AVX2)


def test_the_report_is_a_file_of_the_engine(llama: Path, tmp_path: Path) -> None:
    out = build(BuildRequest(llama, tmp_path / "engine"))
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    passes = page.text("passes")
    assert f"over {TOKENS} tokens of a fixed text" in passes
    assert all(step.name in passes for step in PIPELINES["int8"])
    assert "rank0/weights.safetensors" in page.text("built") and "config.json SHA-256" in page.text("built")
    assert "share an arena of" in page.text("memory") and "bfloat16" in page.text("memory")
    assert "built without --calibration" in page.text("accuracy")
    assert dict(engine_rows(inspection.inspect(out)))["report"] == f"{out}/report.html"


def test_drift_can_be_left_out(llama: Path, tmp_path: Path) -> None:
    out = build(BuildRequest(llama, tmp_path / "engine", drift=False))
    assert "Drift: not measured: built with --no-drift." in Page((out / "report.html").read_text()).text("passes")


def test_keys_ignored_on_request_are_recorded(llama: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(llama, checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"qk_scale": 2, "gates": [1]}))
    with pytest.raises(CompileError, match=r"pass --ignore-config-key qk_scale --ignore-config-key gates\.$"):
        build(BuildRequest(checkpoint, tmp_path / "engine"))
    manifest = manifest_of(BuildRequest(checkpoint, tmp_path / "engine", reading=Reading(("qk_scale", "gates"))))
    opened = manifest.passes[0]
    assert opened.options["ignored_config_keys"] == ["qk_scale", "gates"]
    assert "key qk_scale of config.json, 2, was ignored because --ignore-config-key asked for it" in opened.refusals
