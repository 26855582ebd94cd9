"""What a TorchScript engine says of itself, what it needs, and what is refused in one sentence."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from belle_compile.runtime.executors.torchscript_model import INPUTS, attribute_of
from belle_compile.runtime.program_json import read_program
from belle_compile.runtime.selftest import read_golden_answers, run_self_test
from tests.compiler.backends.torchscript.harness import Engines, logits_of, needs_avx2
from tests.parity.variants import random_ids

pytestmark = needs_avx2

MODEL, LIBRARY = "model-avx2.ts", "kernels-avx2.so"


@pytest.fixture
def engine(engines: Engines) -> Path:
    return engines.engine("llama_gqa", "int8")


def test_the_engine_says_what_it_is(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = inspection.inspect(engine)
    assert found["target"]["backend"] == "torchscript"
    files = {MODEL, LIBRARY, "program.json", "weights.safetensors"}
    assert {name for name in found["files"] if name.startswith("rank0/")} == {f"rank0/{name}" for name in files}
    assert found["kernel_calls"]["before"] > found["kernel_calls"]["after"] > 0
    assert inspection.verify(engine)["files"] == len(found["files"])
    manifest = read_manifest(engine)
    assert manifest.toolchain["torch"] == torch.__version__ and "apache-tvm" in manifest.toolchain
    assert manifest.target.requires.isa == manifest.target.isas == ("avx2",)
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


def test_torch_alone_runs_the_module(engine: Path, engines: Engines) -> None:
    """Python without this package, as libtorch: it loads the library of kernels, and gives the module weights and memory."""
    program, ids = read_program(engine / "rank0"), random_ids(engines.checkpoint("llama_gqa"), 5)
    names = {name: attribute_of(name) for name in program.weight_names()}
    code = f"""
import ctypes, json, sys, torch
ctypes.CDLL({str(engine / "rank0" / LIBRARY)!r})
module = torch.jit.load({str(engine / "rank0" / MODEL)!r})
contents = torch.frombuffer(bytearray(open({str(engine / "rank0" / "weights.safetensors")!r}, "rb").read()), dtype=torch.uint8)
size = int.from_bytes(contents[:8].numpy().tobytes(), "little")
header = json.loads(contents[8 : 8 + size].numpy().tobytes())
for name, attribute in {names!r}.items():
    start, end = (8 + size + at for at in header[name]["data_offsets"])
    setattr(module, attribute, contents[start:end].clone())
def numbers(*values): return torch.tensor(values, dtype=torch.int32)
inputs = {{"token_ids": numbers(*{ids}), "positions": numbers(*range({len(ids)})), "sequences": torch.zeros(5, dtype=torch.int32),
    "block_table": torch.zeros({program.max_blocks}, dtype=torch.int32), "logit_rows": numbers({len(ids) - 1}), "T": numbers({len(ids)}),
    "R": numbers(1), "arena": torch.zeros({program.arena_bytes // 4}), "cache": torch.zeros({program.kv.block_bytes}, dtype=torch.uint8)}}
logits = module(*(inputs[name] for name in {INPUTS!r}))
print(logits.shape, int(logits[0].argmax()), "belle_compile" in sys.modules)
"""  # noqa: E501
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=engine, capture_output=True, text=True, timeout=120)
    best = int(logits_of(engine, [{0: ids}], 0)[-1].argmax())
    shape = torch.Size([program.max_rows, program.vocab_size])
    assert done.stdout.strip() == f"{shape} {best} False", done.stderr


def test_a_library_loads_where_libtorch_is_not(engine: Path) -> None:
    code = f"import ctypes; ctypes.CDLL({str(engine / 'rank0' / LIBRARY)!r}).belle_most_threads()"
    subprocess.run([sys.executable, "-I", "-c", code], check=True, timeout=60)


def test_no_path_of_the_build_host_is_in_the_engine(engine: Path) -> None:
    with zipfile.ZipFile(engine / "rank0" / MODEL) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    contents[LIBRARY] = (engine / "rank0" / LIBRARY).read_bytes()
    root = str(Path(__file__).parents[4]).encode()
    assert not [name for name, content in contents.items() if root in content or b"mangle" in content or b"traced" in content]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "cpux2"}, r"found several ranks, where a module runs in one process; use --backend tvm"),
        ({"target": "a100x1"}, r"^backend: backend for a100-40g: found torchscript, expected triton"),
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
    for name in (MODEL, LIBRARY, "weights.safetensors"):
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
        r"found no PyTorch, expected the package torch; pip install -c constraints\.txt '\.\[torchscript\]'", host_error(engine)
    )


def test_hosts_with_an_older_pytorch(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchscript_factory, "installed", lambda: "2.9.1+cu130")
    expected = r"PyTorch is too old for this module: found 2\.9\.1\+cu130, expected 2\.\d+ or later; install torch 2\."
    assert re.search(expected, host_error(engine))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def without_code(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist() if "/code/" not in name}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def another(path: Path) -> None:
    """A module whose offsets are those of another program."""
    other = path.with_name(MODEL)
    with zipfile.ZipFile(other) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, re.sub(rb"belle_[0-9a-f]{16}", b"belle_0123456789abcdef", content))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"^torchscript: PyTorch .* cannot load .*model-avx2\.ts: found .*; copy the engine again or rebuild it"),
        (without_code, r"^torchscript: PyTorch .* cannot load .*model-avx2\.ts: found .*; copy the engine again or rebuild it"),
        (another, r"^torchscript: PyTorch .* cannot load .*model-avx2\.ts: found .*; copy the engine again or rebuild it"),
        (Path.unlink, r"^engine: file .*model-avx2\.ts is missing"),
    ],
)
def test_damaged_modules(damage: Callable[[Path], None], message: str, engine: Path, tmp_path: Path) -> None:
    """Where nobody compared digests, which loading an engine does first."""
    copy = shutil.copytree(engine, tmp_path / "engine")
    damage(copy / "rank0" / MODEL)
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
    manifest = read_manifest(engine)
    executor: Any = executor_of(manifest).load(LoadRequest(engine / "rank0", manifest))
    batch = executor.batch
    batch.tokens, batch.rows = 1, 0
    del executor._tensors[-1]
    with pytest.raises(EngineError, match=r"^torchscript: PyTorch cannot run the step: found .*argument"):
        executor.step(batch)
    executor.close()


def test_the_version_is_that_of_major_and_minor() -> None:
    torchscript_factory.check_version("2.0.1")
    with pytest.raises(EngineError, match=r"expected 99\.0 or later"):
        torchscript_factory.check_version("99.0.1")
