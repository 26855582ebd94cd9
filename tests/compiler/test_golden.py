"""The golden answers of built engines: what is clear, the same by the engine and by the meanings, and what they find."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from belle_compile.compiler import golden, inspection
from belle_compile.compiler.cli.rows import engine_rows
from belle_compile.compiler.driver import BuildRequest, build
from belle_compile.compiler.golden import LEAD, clearest_cut, lowest_isa
from belle_compile.runtime import Engine, EngineError, host
from belle_compile.runtime.artifact import MANIFEST_NAME, FileRecord, Manifest, manifest_text, read_manifest
from belle_compile.runtime.selftest import SELF_TEST_NAME, read_golden_answers
from tests import kernel_cache
from tests.parity.variants import VARIANTS

kernel_cache.install()

ROOT = Path(__file__).parents[2]
ISAS = ("avx2",)
FIXTURE = ROOT / "tests/fixtures/tiny-bloom-trained"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model."""
    return build(BuildRequest(FIXTURE, tmp_path_factory.mktemp("engines") / "trained", isas=ISAS, drift=False))


def unrunnable(manifest: Manifest) -> None:
    """`lowest_isa` on a host that cannot run the engine."""


def test_the_clearest_place_of_a_text() -> None:
    logits = np.zeros((6, 100), np.float32)
    logits[0, 3] = 90  # the clearest, but the prompt would be short
    logits[3, 5], logits[3, 6] = 9, 8
    logits[4, 7], logits[4, 8] = 9, 1
    cut = clearest_cut(logits)
    assert cut is not None and cut[0] == 5
    assert cut[1] == pytest.approx(LEAD * logits[4].std())
    assert clearest_cut(logits[:1]) is not None, "a text of one token"
    logits[:, 50] = logits.max(axis=1)
    assert clearest_cut(logits) is None, "ties are not clear, nor are equal logits"


def test_answers_are_clear(engine: Path) -> None:
    answers = read_golden_answers(engine, read_manifest(engine))
    assert len(answers.answers) == golden.PROMPTS and answers.tokens > golden.PROMPTS
    with Engine.load(engine, kv_tokens=512) as loaded:
        assert loaded.self_test().tokens == answers.tokens
        for answer in answers.answers:
            rows = loaded.logits([*answer.prompt, *answer.tokens[:-1]], start=len(answer.prompt) - 1)
            second, first = np.partition(rows, -2, axis=1)[:, -2:].T
            assert tuple(rows.argmax(axis=1)) == answer.tokens
            assert (first - second >= 0.99 * LEAD * rows[0].std()).all()


def test_hosts_run_the_instruction_set_that_most_of_them_have(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = replace(read_manifest(engine).target, isas=("amx", "avx512vnni", "avx2"))
    manifest = replace(read_manifest(engine), target=target)
    for here, expected in ((("amx", "avx512vnni", "avx2"), "avx2"), (("avx2",), "avx2"), ((), None)):
        monkeypatch.setattr(host, "host_isas", lambda here=here: here)
        assert lowest_isa(manifest) == expected


def test_a_host_that_is_too_small_for_the_weights_runs_the_kernels(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The meanings take hours where weights are gigabytes. Mapped ones need no memory that must be there."""
    manifest = read_manifest(engine)
    requires = manifest.target.requires
    assert 0 < requires.mapped_bytes < requires.memory_bytes
    for memory, expected in ((requires.resident_bytes, "avx2"), (requires.resident_bytes - 1, None)):
        monkeypatch.setattr(host, "memory_bytes", lambda memory=memory: memory)
        assert lowest_isa(manifest) == expected


def test_the_meanings_choose_the_same_tokens(engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golden, "lowest_isa", unrunnable)
    elsewhere = build(BuildRequest(FIXTURE, tmp_path / "engine", isas=ISAS, drift=False))
    assert (elsewhere / SELF_TEST_NAME).read_bytes() == (engine / SELF_TEST_NAME).read_bytes()


def test_an_engine_for_gpus_is_never_run(engine: Path) -> None:
    """What it answers would depend on the GPU of the build host."""
    manifest = read_manifest(engine)
    anywhere = replace(manifest.target, requires=replace(manifest.target.requires, arch=""))
    assert lowest_isa(replace(manifest, target=anywhere)) is None
    other = replace(manifest.target, requires=replace(manifest.target.requires, arch="pdp11"))
    assert lowest_isa(replace(manifest, target=other)) is None


def test_damaged_weights_are_found(engine: Path, tmp_path: Path) -> None:
    """Weights larger than 64 MiB are checked by their size only: that is what such an engine is like."""
    damaged = Path(shutil.copytree(engine, tmp_path / "engine"))
    weights = damaged / "rank0/weights.safetensors"
    content = bytearray(weights.read_bytes())
    middle, size = len(content) // 2, 128 << 10  # three hundredths of it
    content[middle : middle + size] = bytes(byte ^ 0x80 for byte in content[middle : middle + size])
    weights.write_bytes(content)
    manifest = read_manifest(damaged)
    record = FileRecord(hashlib.sha256(content).hexdigest(), len(content))
    changed = replace(manifest, files=dict(manifest.files) | {"rank0/weights.safetensors": record})
    (damaged / MANIFEST_NAME).write_text(manifest_text(changed), encoding="utf-8")
    with Engine.load(damaged, kv_tokens=512) as loaded:
        with pytest.raises(EngineError, match=r"^self-test: token \d+ of \d+ of the answer to prompt \d of 6 is not"):
            loaded.self_test()


def test_ranks_give_the_answers_that_their_build_made(tmp_path: Path) -> None:
    out = build(BuildRequest(FIXTURE, tmp_path / "two", target="cpux2", isas=ISAS, drift=False))
    answers = read_golden_answers(out, read_manifest(out))
    assert answers.answers
    command = [sys.executable, "-m", "belle_compile.runtime", str(out), "--self-test", "--kv-tokens", "512"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"self-test: {len(answers.answers)} prompts, {answers.tokens} tokens, as built\n"


@pytest.mark.usefixtures("no_kernels")
def test_a_model_without_preferences_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golden, "LEAD", 1e9)
    out = build(BuildRequest(VARIANTS["llama_gqa"](tmp_path / "tiny"), tmp_path / "engine", drift=False))
    answers = read_golden_answers(out, read_manifest(out))
    assert not answers.answers
    assert answers.reason.startswith("the model clearly prefers no token after any part of ")
    assert dict(engine_rows(inspection.inspect(out)))["self-test"] == f"none: {answers.reason}"


def test_inspect_counts_them(engine: Path) -> None:
    answers = read_golden_answers(engine, read_manifest(engine))
    assert dict(engine_rows(inspection.inspect(engine)))["self-test"] == f"6 prompts, {answers.tokens} tokens"


@pytest.mark.parametrize(
    ("parameters", "run", "evaluated"), [(1_000, 12, 12), (134_515_008, 12, 7), (1_100_000_000, 12, 2), (7_069_016_064, 4, 2)]
)
def test_larger_models_have_shorter_answers(engine: Path, parameters: int, run: int, evaluated: int) -> None:
    manifest = read_manifest(engine)
    cpu = replace(manifest, model=replace(manifest.model, parameters=parameters))
    gpu = replace(cpu, target=replace(cpu.target, requires=replace(cpu.target.requires, arch="")))
    assert (golden.answer_tokens(cpu), golden.answer_tokens(gpu)) == (run, evaluated)
