"""Whole builds with real kernels: the same bytes twice, INT8 kernels against their meaning, memory, engines that do not fit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file

from belle_compile.compiler import cli, targets
from belle_compile.compiler.checkpoint import open_checkpoint
from belle_compile.compiler.driver import BuildRequest, build
from belle_compile.compiler.families import build_graph
from belle_compile.passes.pipeline import run_pipeline
from belle_compile.runtime import Engine, host
from belle_compile.runtime.errors import EngineError
from tests import kernel_cache
from tests.parity.engines import Builder, EngineStepper
from tests.parity.stepping import Stepper
from tests.parity.variants import make_llama, random_ids
from tests.pipelines import PIPELINES

ROOT = Path(__file__).parents[2]
RUNNABLE = tuple(isa for isa in ("avx512vnni", "avx2") if isa in host.host_isas())
Floats = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    return Builder(tmp_path_factory.mktemp("engines"))


# The same bytes


def test_the_same_checkpoint_gives_the_same_bytes_kernels_included(
    builder: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = builder.engine("llama_gqa", "int8", targets.parse("cpu").isas)
    monkeypatch.delenv(kernel_cache.FOLDER, raising=False)
    second = build(BuildRequest(builder.checkpoint("llama_gqa"), tmp_path / "elsewhere", quantization="int8"))
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(second) for path in second.rglob("*") if path.is_file())
    assert {f"kernels-{isa}.so" for isa in targets.parse("cpu").isas} <= {file.name for file in files}
    for file in files:
        assert (first / file).read_bytes() == (second / file).read_bytes(), file


# INT8 engines


def quantized_graph(checkpoint: Path, preset: str) -> ir.Model:
    graph = build_graph(open_checkpoint(checkpoint))
    run_pipeline(graph, PIPELINES[preset])
    return graph


def half_cache_stepper(graph: ir.Model) -> Stepper:
    """The graph's meaning with keys and values kept in bfloat16, as an INT8 engine keeps them."""
    stepper = Stepper(graph)
    stepper.cache.k, stepper.cache.v = (part.astype(np.dtype("bfloat16")) for part in (stepper.cache.k, stepper.cache.v))  # type: ignore[assignment]
    return stepper


def engine_logits(directory: Path, isa: str | None, steps: list[list[int]]) -> Floats:
    with Engine.load(directory, isa=isa, threads=2, kv_tokens=256) as engine:
        if isa is not None:
            assert engine.executor.isa == isa  # type: ignore[attr-defined]
        stepper = EngineStepper(engine)
        return np.concatenate([stepper.step({0: step})[0] for step in steps])


CASES = [("bloom", "int8"), ("llama_gqa", "int8"), ("bloom", "int4"), ("llama_gqa", "int4")]


def isas_of(variant: str, preset: str) -> tuple[str, ...]:
    """Engines that other tests build too."""
    return targets.parse("cpu").isas if (variant, preset) == ("llama_gqa", "int8") else RUNNABLE


def prompts(checkpoint: Path, count: int = 4) -> list[list[list[int]]]:
    """Steps of one sequence each: a prompt of 21 tokens, then 4 one by one."""
    several = [random_ids(checkpoint, 25, seed) for seed in range(count)]
    return [[ids[:21], *([token] for token in ids[21:])] for ids in several]


@pytest.mark.skipif(len(RUNNABLE) < 2, reason="needs AVX2 and AVX512-VNNI")
@pytest.mark.parametrize(("variant", "preset"), CASES)
def test_all_instruction_sets_give_the_same_logits(
    builder: Builder, variant: str, preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit: integers are exact, and the kernels add floats in the same order whatever the registers' width."""
    directory = builder.engine(variant, preset, isas_of(variant, preset))
    steps = prompts(builder.checkpoint(variant), 1)[0]
    expected = engine_logits(directory, RUNNABLE[0], steps)
    for isa in RUNNABLE[1:]:
        np.testing.assert_array_equal(engine_logits(directory, isa, steps), expected)
        monkeypatch.setenv("BELLE_ISA", isa)
        np.testing.assert_array_equal(engine_logits(directory, None, steps), expected)


@pytest.mark.parametrize(("variant", "preset"), CASES)
def test_logits_are_those_of_the_quantized_graph(builder: Builder, variant: str, preset: str) -> None:
    """Rows are equal to a few units in the last place, or a value that lay between two integers was rounded the other way.

    The order of float32 sums decides such a value. It can disturb its row and, through the cache, those behind it by as much as
    quantization itself does, but no more; and it is rare: about 1 prompt in 8 has one.
    """
    checkpoint = builder.checkpoint(variant)
    directory = builder.engine(variant, preset, isas_of(variant, preset))
    graph, unquantized = quantized_graph(checkpoint, preset), build_graph(open_checkpoint(checkpoint))
    exact = []
    for steps in prompts(checkpoint):
        found = engine_logits(directory, None, steps)
        stepper, original = half_cache_stepper(graph), Stepper(unquantized)
        meant = np.concatenate([stepper.step({0: step})[0] for step in steps])
        fp32 = np.concatenate([original.step({0: step})[0] for step in steps])
        scale = np.abs(fp32).max()
        error, quantization_error = np.abs(found - meant) / scale, np.abs(meant - fp32) / scale
        most = 0.05 if preset == "int8" else 0.2
        assert 0.001 < quantization_error.mean() < most, "quantization shows, and is quantization only"
        assert error.mean() < quantization_error.mean() / 4
        exact.extend(error.max(axis=1) < 1e-6)
    assert np.mean(exact) > 0.5, f"{np.mean(exact):.2f} of the rows are equal"


# Memory

# Builds the checkpoints named one after the other and prints how large anonymous memory was at most during each build. Kernels
# are left out: they are the same for any number of layers, and LLVM's memory would hide the tensors'.
BUILD_AND_MEASURE = """
import re, sys, threading
from pathlib import Path
from belle_compile.compiler import golden
from belle_compile.compiler.backends.tvm import library
from belle_compile.compiler.driver import BuildRequest, build

def watch(finished, sizes):
    while not finished.wait(0.001):
        sizes.append(int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10)

golden.lowest_isa = lambda manifest: None
library.compile_library = lambda kernels, isa, tilings: f"{len(kernels)} kernels".encode()
out, *checkpoints = sys.argv[1:]
for checkpoint in checkpoints:
    finished, sizes = threading.Event(), [0]
    threading.Thread(target=watch, args=(finished, sizes), daemon=True).start()
    build(BuildRequest(checkpoint, Path(out), isas=("avx2",), force=True, drift=False))
    finished.set()
    print(max(sizes), Path(out, "rank0/kernels-avx2.so").read_bytes()[:-64].decode())
"""
HIDDEN, FFN = 512, 1408
LAYER_BYTES = 4 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * FFN)  # in float32


def make_wide_llama(directory: Path, layers: int) -> Path:
    make_llama(directory, num_hidden_layers=layers, hidden_size=HIDDEN, intermediate_size=FFN)
    weights = directory / "model.safetensors"
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in load_file(weights).items()}, weights)
    return directory


def test_memory_of_a_build_does_not_grow_with_the_number_of_layers(tmp_path: Path) -> None:
    few, many = (make_wide_llama(tmp_path / f"{layers}-layers", layers) for layers in (2, 8))
    # The first build pays for imports and for what the compiler's libraries allocate once.
    command = [sys.executable, "-c", BUILD_AND_MEASURE, *map(str, (tmp_path / "engine", few, few, many))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    _, (peak_few, *kernels_few), (peak_many, *kernels_many) = map(str.split, done.stdout.splitlines())
    assert kernels_few == kernels_many
    # Six layers more; the allocator keeps up to one layer more or less from run to run.
    assert int(peak_many) - int(peak_few) < 2 * LAYER_BYTES, f"{done.stdout}a layer has {LAYER_BYTES} bytes"


# Engines that do not fit


@pytest.fixture
def engine(builder: Builder, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(builder.engine("llama_gqa", "int8", targets.parse("cpu").isas), tmp_path / "engine"))


@pytest.mark.parametrize("isa", RUNNABLE)
def test_golden_answers_are_given_by_every_instruction_set(engine: Path, isa: str) -> None:
    with Engine.load(engine, isa=isa, kv_tokens=512) as loaded:
        assert loaded.self_test().prompts > 0


def sentences(engine: Path, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """What `belle-compile verify` and Engine.load say of an engine they refuse."""
    with pytest.raises(SystemExit) as end:
        cli.main(["verify", str(engine)])
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (1, "")
    with pytest.raises(EngineError) as error:
        Engine.load(engine, verify="full", kv_tokens=64)
    assert err.count("\n") == 1 and str(error.value).endswith(".")
    return err.removeprefix("belle-compile: ").removesuffix("\n"), str(error.value)


@pytest.mark.parametrize(
    "file", ["tokenizer.json", *(f"rank0/{name}" for name in ("weights.safetensors", "program.json", "kernels-avx2.so"))]
)
@pytest.mark.parametrize("where", [0.0, 0.5, 1.0])
def test_one_changed_byte_of_a_file_is_found(engine: Path, file: str, where: float, capsys: pytest.CaptureFixture[str]) -> None:
    content = bytearray((engine / file).read_bytes())
    content[round(where * (len(content) - 1))] ^= 1
    (engine / file).write_bytes(content)
    for sentence in sentences(engine, capsys):
        assert sentence.startswith(f"engine: digest of {file}: found SHA-256 ")
        assert sentence.endswith("the file was changed after the build: copy the engine again or rebuild it.")


def test_a_kernel_library_from_elsewhere_is_refused(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(engine / "rank0/kernels-avx2.so", engine / "rank0/kernels-avx2-znver4.so")
    for sentence in sentences(engine, capsys):
        remedy = "remove it or copy the engine again."
        assert sentence.endswith(f"file rank0/kernels-avx2-znver4.so is not in the manifest; {remedy}")


# What is changed in the manifest, and what is said then; MANIFEST and ENGINE stand for the paths.
CHANGES = {
    "a field": (
        '"format_version"',
        '"format_versioo"',
        "format version of MANIFEST: found none, expected 3; rebuild the engine",
    ),
    "an instruction set": ('"avx2"', '"avx3"', "MANIFEST was changed after the build: found digest "),
    "a quote": ('"rank0/program.json"', '"rank0/program.json', "MANIFEST is not JSON: found "),
    "a path": (
        "rank0/weights",
        "rank0/weightz",
        "MANIFEST was changed after the build: found digest ",
    ),
    "a path that leads out": ("rank0/weights", "../0/weights", "MANIFEST: field files does not fit: found path "),
    "the architecture": (
        '"x86_64"',
        '"x86_65"',
        "MANIFEST was changed after the build: found digest ",
    ),
    "a default": ('"top_k": ', '"top_k": 1', "MANIFEST was changed after the build: found digest "),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_bytes_of_the_manifest_are_found(engine: Path, change: str, capsys: pytest.CaptureFixture[str]) -> None:
    old, new, message = CHANGES[change]
    manifest = engine / "manifest.json"
    text = manifest.read_text()
    assert old in text
    manifest.write_text(text.replace(old, new, 1))
    for sentence in sentences(engine, capsys):
        assert sentence.startswith("engine: " + message.replace("MANIFEST", str(manifest)).replace("ENGINE", str(engine)))


def test_a_changed_digest_of_the_manifest_is_found(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = engine / "manifest.json"
    plain = json.loads(manifest.read_text())
    digest = plain["files"]["tokenizer.json"]["sha256"]
    manifest.write_text(manifest.read_text().replace(digest, digest[:-1] + ("0" if digest[-1] != "0" else "1")))
    for sentence in sentences(engine, capsys):
        assert sentence.startswith(f"engine: {manifest} was changed after the build: found digest ")


def test_an_engine_for_another_host_says_what_is_missing(
    engine: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "cpu_flags", lambda: frozenset({"sse4_2", "avx2"}))
    for sentence in sentences(engine, capsys):
        assert sentence.startswith("engine: this host cannot run the engine built for cpu: found instruction sets none known (")
        assert "avx2 lacks f16c, fma), expected one of amx, avx512vnni, avx2; run it on a newer CPU or rebuild it" in sentence
