"""What a TorchScript engine says of itself, what it needs, and what is refused in one sentence."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from belle_compile.compiler import cli, inspection
from belle_compile.compiler.driver import BuildRequest, build
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.plan.table import Load, plan
from belle_compile.compiler.repartition import RepartitionRequest, repartition
from belle_compile.runtime import Engine
from belle_compile.runtime.artifact import read_manifest
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.executors import LoadRequest, executor_of, torchscript_factory
from belle_compile.runtime.executors.torchscript import TorchScriptExecutor
from belle_compile.runtime.executors.torchscript_model import FACTS_MEMBER, MODEL_NAME, read_facts
from belle_compile.runtime.selftest import read_golden_answers, run_self_test
from tests.compiler.backends.torchscript.harness import Engines, needs_vnni

pytestmark = needs_vnni


@pytest.fixture
def engine(engines: Engines) -> Path:
    return engines.engine("llama_gqa", "int8")


def test_the_engine_says_what_it_is(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = inspection.inspect(engine)
    assert found["target"]["backend"] == "torchscript"
    assert {name for name in found["files"] if name.startswith("rank0/")} == {"rank0/model.ts", "rank0/weights.safetensors"}
    assert found["kernel_calls"]["before"] > found["kernel_calls"]["after"] > 0
    assert inspection.verify(engine)["files"] == len(found["files"])
    manifest, facts = read_manifest(engine), read_facts(engine / "rank0" / MODEL_NAME)
    assert manifest.toolchain["torch"] == facts.torch == torch.__version__
    assert manifest.target.requires.isa == manifest.target.isas == ("avx512vnni",)
    assert facts.kv_dtype == "bfloat16"
    with pytest.raises(SystemExit) as end:
        cli.main(["inspect", str(engine)])
    assert not end.value.code
    shown = capsys.readouterr().out
    assert torch.__version__ in shown and "size of module" in shown


def test_memory_is_the_same_in_the_plan_and_in_the_manifest(engine: Path, engines: Engines) -> None:
    context = read_manifest(engine).model.dimensions["max_position"]
    found = plan(engines.checkpoint("llama_gqa"), "cpu", "int8", Load(1, min(2048, context)), backend="torchscript")
    one, two, *_ = found["plan"]
    assert one["needed_bytes"] == read_manifest(engine).target.requires.memory_bytes
    assert "several ranks, where a module runs in one process" in two["refused"]


def test_golden_answers(engines: Engines) -> None:
    directory = engines.engine("trained", "int8")
    with Engine.load(directory, threads=1, kv_tokens=1024) as engine:
        golden = read_golden_answers(directory, engine.manifest)
        assert golden.answers
        run_self_test(engine.generate, golden)


def test_torch_alone_runs_the_module(engine: Path) -> None:
    """Python without this package, as libtorch: the module holds its own code."""
    code = f"""
import json, sys, torch
extra = {{"belle.json": ""}}
module = torch.jit.load({str(engine / "rank0" / MODEL_NAME)!r}, _extra_files=extra)
facts = json.loads(extra["belle.json"])
for weight in facts["weights"].values():
    tensor = torch.zeros(weight["shape"], dtype=getattr(torch, weight["dtype"]))
    if weight["attribute"]:
        setattr(module, weight["attribute"], tensor)
    if weight["packed"]:
        setattr(module, weight["packed"], torch.ops.onednn.qlinear_prepack(tensor, None))
zero, one = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.int64)
cells = torch.arange(facts["tile"])
pool = [torch.zeros(facts["num_layers"], 1, 16, facts["num_kv_heads"], facts["head_dim"], dtype=torch.bfloat16) for _ in "kv"]
scales = [torch.zeros(facts["num_layers"], 0, 16, facts["num_kv_heads"]) for _ in "kv"]
groups = torch.tensor([[1, 1, 16]])
logits = module(zero, zero, zero, zero, one, 0 * cells, cells, zero, groups, zero, *pool, *scales)
assert logits.shape == (1, facts["vocab_size"]) and "belle_compile" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=engine, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_no_path_of_the_build_host_is_in_the_module(engine: Path) -> None:
    with zipfile.ZipFile(engine / "rank0" / MODEL_NAME) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    assert FACTS_MEMBER in contents
    root = str(Path(__file__).parents[4]).encode()
    assert not [name for name, content in contents.items() if root in content or b"mangle" in content]


def test_weights_are_kept_once(engines: Engines) -> None:
    """Those of products are packed; only an embedding, which is not, stays in the mapped file."""
    facts = read_facts(engines.engine("trained", "int8-plain") / "rank0" / MODEL_NAME)
    matrices = [weight for weight in facts.weights.values() if weight.dtype == "int8"]
    assert {bool(weight.packed) for weight in matrices} == {True}
    assert sum(bool(weight.attribute) for weight in matrices) == 1, "the tied embedding"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization": "int4"}, r"found weights in int4 in groups of \d+ inputs, .*; use --backend tvm"),
        ({"target": "cpux2"}, r"found several ranks, where a module runs in one process; use --backend tvm"),
        ({"target": "a100x1"}, r"^backend: backend for a100-40g: found torchscript, expected triton"),
        ({"isas": ("avx2",)}, r"^target: instruction set of cpu: found avx2, expected amx, avx512vnni"),
        ({"tune": True}, r"^target: tuning for cpu: found no kernels to measure"),
        ({"kv_cache": "int4"}, r"^kv cache: unknown type for the backend torchscript: found 'int4'"),
    ],
)
def test_what_it_cannot_do_is_refused(changes: dict[str, Any], message: str, engines: Engines, tmp_path: Path) -> None:
    with pytest.raises(CompileError, match=message):
        build(BuildRequest(engines.checkpoint("llama"), tmp_path / "engine", **{"backend": "torchscript"} | changes))
    assert not list(tmp_path.iterdir())


def test_an_engine_is_made_again_of_its_weights(engine: Path, tmp_path: Path) -> None:
    """They are read back as they are."""
    again = repartition(RepartitionRequest(engine, tmp_path / "again", "cpu"))
    for name in ("model.ts", "weights.safetensors"):
        assert (again / "rank0" / name).read_bytes() == (engine / "rank0" / name).read_bytes()
    with pytest.raises(CompileError, match=r"found several ranks, where a module runs in one process; use --backend tvm"):
        repartition(RepartitionRequest(engine, tmp_path / "two", "cpux2"))


def host_error(engine: Path) -> str:
    with pytest.raises(EngineError) as caught:
        Engine.load(engine, kv_tokens=64)
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".")
    return text


def test_hosts_without_pytorch(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchscript_factory, "installed", lambda: None)
    assert re.search(
        r"found no PyTorch, expected the package torch; pip install 'belle-compile\[torchscript\]'", host_error(engine)
    )


def test_hosts_with_an_older_pytorch(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchscript_factory, "installed", lambda: "2.9.1+cu130")
    expected = r"PyTorch is too old for this module: found 2\.9\.1\+cu130, expected 2\.\d+ or later; install torch 2\."
    assert re.search(expected, host_error(engine))


def test_hosts_without_vnni(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchscript_factory.host, "cpu_flags", lambda: frozenset({"avx2", "fma"}))
    assert re.search(r"found avx512vnni lacks .*, expected one of avx512vnni; run it on a newer CPU", host_error(engine))


@pytest.mark.parametrize(("isa", "expected"), [("AVX2", "overflow on this host: found "), ("DEFAULT", "exact")])
def test_kernels_whose_sums_overflow(isa: str, expected: str) -> None:
    code = "from belle_compile.runtime.executors.torchscript import check_products\ncheck_products()\nprint('exact')"
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": isa}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert expected in done.stdout + done.stderr


def test_another_instruction_set_than_the_engines(engine: Path) -> None:
    with pytest.raises(EngineError, match=r"instruction set: found avx2, expected avx512vnni; PyTorch chooses kernels itself"):
        Engine.load(engine, isa="avx2", kv_tokens=64)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def without_code(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist() if "/code/" not in name}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            truncate,
            r"^torchscript: module .*model\.ts: found .*, expected a whole archive; copy the engine again or rebuild it",
        ),
        (without_code, r"^torchscript: PyTorch .* cannot load .*model\.ts: found .*; copy the engine again or rebuild it"),
        (Path.unlink, r"^engine: file .*model\.ts is missing"),
    ],
)
def test_damaged_modules(damage: Callable[[Path], None], message: str, engine: Path, tmp_path: Path) -> None:
    """Where nobody compared digests, which loading an engine does first."""
    copy = shutil.copytree(engine, tmp_path / "engine")
    damage(copy / "rank0" / MODEL_NAME)
    with pytest.raises(EngineError):
        Engine.load(copy, kv_tokens=64)
    manifest = read_manifest(engine)
    with pytest.raises(EngineError, match=message):
        executor_of(manifest).load(LoadRequest(copy / "rank0", manifest))


def test_weights_of_another_engine(engine: Path, engines: Engines, tmp_path: Path) -> None:
    copy, other = shutil.copytree(engine / "rank0", tmp_path / "rank0"), engines.engine("llama", "int8-accurate", "float16")
    shutil.copy(other / "rank0" / "weights.safetensors", copy)
    manifest = read_manifest(engine)
    with pytest.raises(EngineError, match=r"header of .*weights\.safetensors: found SHA-256"):
        executor_of(manifest).load(LoadRequest(copy, manifest))


def test_a_step_that_fails_is_an_error_of_the_engine(engine: Path) -> None:
    facts = read_facts(engine / "rank0" / MODEL_NAME)
    executor = TorchScriptExecutor(
        engine / "rank0", facts, threads=1, kv_memory=LoadRequest(engine, read_manifest(engine)).kv_memory
    )
    batch = executor.batch
    batch.tokens = batch.rows = 1
    batch.token_ids[0] = np.iinfo(np.int32).max
    with pytest.raises(EngineError, match=r"^torchscript: PyTorch cannot run the step: found .*index"):
        executor.step(batch)
    executor.close()


def test_the_version_is_that_of_major_and_minor(engine: Path) -> None:
    facts = read_facts(engine / "rank0" / MODEL_NAME)
    torchscript_factory.check_version(replace(facts, torch="2.0.1"))
    with pytest.raises(EngineError, match=r"expected 99\.0 or later"):
        torchscript_factory.check_version(replace(facts, torch="99.0.1"))
