"""Builds of engines that take adapters at run time: what is written, and what is refused before anything is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from belle_compile.compiler.build_request import BuildRequest, resolve
from belle_compile.compiler.driver import build
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.repartition import RepartitionRequest, repartition
from belle_compile.runtime.adapters.basis import BASIS_NAME, EngineBasis
from belle_compile.runtime.artifact import read_manifest
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.program_json import program_from_json, read_program
from tests.compiler.test_cli import fail, run
from tests.parity.variants import VARIANTS

pytestmark = pytest.mark.usefixtures("no_kernels")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return VARIANTS["llama"](tmp_path_factory.mktemp("bases") / "llama")


def test_the_engine_says_what_it_takes(capsys: pytest.CaptureFixture[str], base: Path, tmp_path: Path) -> None:
    out = tmp_path / "engine"
    options = "--lora-rank", "6", "--lora-targets", "q_proj,layers.1.mlp.down_proj"
    made = json.loads(run(capsys, "build", base, *options, "-o", out, "--json")[1])
    record = next(record for record in made["passes"] if record["name"] == "add-low-rank")
    assert record["options"] == {"lora_rank": 6, "lora_targets": ["q_proj", "layers.1.mlp.down_proj"]}
    assert record["changes"] == 3 and not record["refusals"]
    names = {f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)} | {"model.layers.1.mlp.down_proj"}
    basis, program = EngineBasis.read(out), read_program(out / "rank0")
    assert basis.linears.keys() == names and program.adapters is not None
    assert program.adapters.regions.keys() == names and program.adapters.rank == 6
    assert BASIS_NAME in read_manifest(out).files
    again = build(BuildRequest(base, tmp_path / "again", lora_rank=6, lora_targets=("q_proj", "layers.1.mlp.down_proj")))
    for name in (BASIS_NAME, "rank0/program.json", "graph.onnx"):
        assert (again / name).read_bytes() == (out / name).read_bytes()
    plain = build(BuildRequest(base, tmp_path / "plain"))
    assert (plain / "graph.onnx").read_bytes() == (out / "graph.onnx").read_bytes() and not (plain / BASIS_NAME).exists()
    assert "adapters" not in (plain / "rank0" / "program.json").read_text()
    with pytest.raises(CompileError, match="found an engine that takes adapters; build it again from its checkpoint"):
        repartition(RepartitionRequest(out, tmp_path / "ranks", "cpux2"))


def test_programs_with_other_places_are_refused(base: Path, tmp_path: Path) -> None:
    out = build(BuildRequest(base, tmp_path / "engine", lora_rank=4))
    plain = json.loads((out / "rank0" / "program.json").read_text())
    name = next(iter(plain["adapters"]["regions"]))
    plain["adapters"]["regions"][name]["inputs"] += 64
    with pytest.raises(EngineError, match="field adapters does not fit: found regions elsewhere"):
        program_from_json(json.dumps(plain))
    plain["adapters"] = None
    with pytest.raises(EngineError, match="expected a linear of the adapters' layout"):
        program_from_json(json.dumps(plain))


def test_refusals_write_nothing(capsys: pytest.CaptureFixture[str], base: Path, tmp_path: Path) -> None:
    command = "build", base, "--no-calibration", "-o", tmp_path / "out"
    assert "option lora-rank: found lora-targets without a rank" in fail(capsys, *command, "--lora-targets", "q_proj")
    assert "expected 0 (none) to 512" in fail(capsys, *command, "--lora-rank", "600")
    assert "found query, expected linear layers such as down_proj" in fail(
        capsys, *command, "--lora-rank", "4", "--lora-targets", "query"
    )
    for target in ("cpux2", "a100x2"):
        assert "found adapters for engines of one rank only" in fail(capsys, *command, "--lora-rank", "4", "--target", target)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("backend", "target"), [("onnxruntime", "cpu"), ("torchscript", "cpu"), ("tensorrt", "t4")])
def test_other_backends_refuse_in_one_sentence(backend: str, target: str, base: Path, tmp_path: Path) -> None:
    options = {"quantization": "int8-accurate"} if backend == "tensorrt" else {}
    request = BuildRequest(base, tmp_path / "out", target=target, backend=backend, lora_rank=4, **options)  # type: ignore[arg-type]
    with pytest.raises(CompileError, match=rf"{backend} cannot build an engine for .* that takes adapters: found no kernel"):
        resolve(request)
