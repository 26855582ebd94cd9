"""Builds for several ranks, with kernels stood in for by a few bytes: a directory for each, and weights that are parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file

from belle_compile.compiler import inspection
from belle_compile.compiler.cli.rows import engine_rows
from belle_compile.compiler.driver import BuildRequest, build
from belle_compile.compiler.errors import CompileError
from belle_compile.passes.quantization import weights
from belle_compile.runtime.artifact import read_manifest, verify_files
from belle_compile.runtime.program_json import read_program
from tests.compiler.report.pages import Page
from tests.parity.variants import VARIANTS

Floats = npt.NDArray[np.float32]
pytestmark = pytest.mark.usefixtures("no_kernels")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return VARIANTS["bloom_6_heads"](tmp_path_factory.mktemp("checkpoints") / "tiny-bloom")


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_every_rank_has_its_directory(checkpoint: Path, quantization: str, tmp_path: Path) -> None:
    one = build(BuildRequest(checkpoint, tmp_path / "one", quantization=quantization))
    out = build(BuildRequest(checkpoint, tmp_path / "engine", quantization=quantization, target="cpux3"))
    manifest = read_manifest(out)
    verify_files(out, manifest, full=True)
    assert (manifest.target.name, manifest.target.ranks) == ("cpux3", 3)
    alone = read_program(one / "rank0")
    programs = [read_program(out / f"rank{rank}") for rank in range(3)]
    assert [program.rank for program in programs] == [0, 1, 2]
    assert {(program.ranks, program.vocab_size, program.kv.kv_heads) for program in programs} == {(3, alone.vocab_size, 2)}
    ends = [0, *(program.logits.first + program.logits.count for program in programs)]
    assert ends == [*(program.logits.first for program in programs), alone.vocab_size]
    sums = [[call.node for call in program.calls if call.all_reduce] for program in programs]
    assert sums[0] == sums[1] == sums[2] and len(sums[0]) == 1 + 2 * 3
    for rank, program in enumerate(programs):
        tensors = load_file(out / f"rank{rank}" / "weights.safetensors")
        assert list(tensors) and set(tensors) == set(program.weight_names())
    assert manifest.kernel_calls.after == len(programs[0].calls) == len(alone.calls) + len(sums[0])


def test_the_passes_are_told(checkpoint: Path, tmp_path: Path) -> None:
    out = build(BuildRequest(checkpoint, tmp_path / "engine", target="cpux2", dump_ir=tmp_path / "ir"))
    records = {record.name: record for record in read_manifest(out).passes}
    assert records["partition-tensors"].options == {"ranks": 2} and records["partition-tensors"].changes
    names = list(records)
    assert names.index("quantize-embedding") < names.index("partition-tensors") < names.index("fuse-dequantize")
    dumped = sorted(path.stem for path in (tmp_path / "ir" / "rank1").glob("*.txt"))
    assert dumped[:2] == ["00-frontend", "01-partition-tensors"] and dumped[-1].endswith("fuse-activation-quantize")
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    assert "numbers are those of rank 0" in page.text("passes")
    assert "for each rank" in page.text("memory")


def test_memory_is_that_of_the_rank_that_needs_most(checkpoint: Path, tmp_path: Path) -> None:
    one = read_manifest(build(BuildRequest(checkpoint, tmp_path / "one", quantization="none")))
    out = build(BuildRequest(checkpoint, tmp_path / "two", quantization="none", target="cpux2"))
    two = inspection.inspect(out)
    assert 0 < two["target"]["requires"]["memory_bytes"] < one.target.requires.memory_bytes
    rows = dict(engine_rows(two))
    assert rows["needs"].endswith("for each of 2 ranks") and "weights of rank 1" in rows


def test_the_same_checkpoint_gives_the_same_bytes(checkpoint: Path, tmp_path: Path) -> None:
    first, second = (build(BuildRequest(checkpoint, tmp_path / name, target="cpux2")) for name in ("a", "b"))
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert len(files) == 5 + 2 * 5
    for file in files:
        assert (first / file).read_bytes() == (second / file).read_bytes(), file


@pytest.mark.parametrize("variant", ["bloom_6_heads", "llama"])
def test_each_weight_is_quantized_once_for_all_ranks(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And as often as for one: linears that are fused are read together on all ranks."""
    read: list[str] = []

    def quantize_rows(weight: Floats, name: str, *rest: Any, **options: Any) -> tuple[Floats, Floats]:
        read.append(name)
        return original(weight, name, *rest, **options)

    original = weights.quantize_rows
    monkeypatch.setattr(weights, "quantize_rows", quantize_rows)
    checkpoint = VARIANTS[variant](tmp_path / "checkpoint")
    build(BuildRequest(checkpoint, tmp_path / "one", quantization="int8-plain", drift=False))
    one = read.copy()
    read.clear()
    build(BuildRequest(checkpoint, tmp_path / "three", quantization="int8-plain", target="cpux3", drift=False))
    assert sorted(read) == sorted(one)


def test_shares_that_do_not_fit_are_refused_before_anything_is_read(checkpoint: Path, tmp_path: Path) -> None:
    heard: list[str] = []
    request = BuildRequest(
        checkpoint, tmp_path / "engine", quantization="int4", target="cpux4", on_progress=lambda stage, *_: heard.append(stage)
    )
    with pytest.raises(CompileError, match=r"key/value heads for 4 ranks: found 6, in units of 16"):
        build(request)
    assert set(heard) == {"open"} and not (tmp_path / "engine").exists()


def test_int8_weights_of_the_ranks_are_panels_of_the_whole(checkpoint: Path, tmp_path: Path) -> None:
    """Shares of 16 outputs are whole panels: those of the vocabulary lie behind each other."""
    one = load_file(build(BuildRequest(checkpoint, tmp_path / "one")) / "rank0/weights.safetensors")
    out = build(BuildRequest(checkpoint, tmp_path / "two", target="cpux2"))
    parts = [load_file(out / f"rank{rank}/weights.safetensors") for rank in range(2)]
    tables = [name for name in one if name.startswith("word_embeddings") and name.endswith(".int8")]
    assert len(tables) == 2, "the rotated embedding is not the head"
    for name in tables:
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), one[name])


def test_a_rank_that_does_not_fit_its_device(checkpoint: Path, tmp_path: Path) -> None:
    """Of what is needed, 288 MiB are there for one rank as for many."""
    target = tmp_path / "small.toml"

    def build_with(mib: float, ranks: int) -> Path:
        target.write_text(f'device = "cpu"\nranks = {ranks}\nmemory_gib = {mib / 1024}\n')
        return build(BuildRequest(checkpoint, tmp_path / "engine", quantization="none", target=str(target)))

    one, two = (
        read_manifest(build(BuildRequest(checkpoint, tmp_path / f"x{ranks}", quantization="none", target=f"cpux{ranks}")))
        for ranks in (1, 2)
    )
    sizes = [manifest.target.requires.memory_bytes / (1 << 20) for manifest in (one, two)]
    message = (
        r"^target: the model does not fit the memory of a cpu device: found .* needed: weights .*, KV cache .*, activations"
    )
    with pytest.raises(CompileError, match=message + r".*expected at most .*; build for 2 ranks \(--target cpux2\)\.$"):
        build_with(sum(sizes) / 2, 1)
    with pytest.raises(CompileError, match=r"^target: rank 0 of 2 does not fit .*; no number of ranks up to 8 will do\.$"):
        build_with(288, 2)
    assert read_manifest(build_with(sum(sizes) / 2, 2)).target.name == "cpux2"
