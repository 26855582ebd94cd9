"""The executor of ONNX Runtime: the bits of a token whatever the step, and the errors of hosts and files that do not fit."""

from __future__ import annotations

import shutil
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("onnxruntime")

from belle_compile.compiler.driver import BuildRequest, build
from belle_compile.runtime import Engine, host
from belle_compile.runtime.artifact import read_manifest
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.executors import LoadRequest, executor_of, onnxruntime_factory
from belle_compile.runtime.executors.base import Executor
from belle_compile.runtime.executors.kv_memory import KvMemory
from belle_compile.runtime.program import BLOCK_SIZE
from tests.parity.copies import logits_over_copies
from tests.parity.variants import VARIANTS, random_ids

LENGTH, PROMPT = 120, 75
CASES = [("llama_gqa", "int8"), ("bloom", "int8"), ("llama_gqa", "none"), ("bloom_3_heads", "none")]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Engines of the cases."""
    root, made = tmp_path_factory.mktemp("engines"), {}
    for variant, quantization in CASES:
        checkpoint = root / variant if (root / variant).exists() else VARIANTS[variant](root / variant)
        out = root / f"{variant}-{quantization}"
        request = BuildRequest(checkpoint, out, quantization=quantization, backend="onnxruntime", drift=False)
        made[variant, quantization] = build(request)
    return made


class Sequences:
    """Sequences over an executor, each with blocks of its own, whose first `PROMPT` tokens are the prompt."""

    def __init__(self, executor: Executor, ids: npt.NDArray[np.int32], count: int) -> None:
        self.batch, self.executor, self.ids = executor.batch, executor, ids
        blocks = -(-LENGTH // BLOCK_SIZE)
        order = np.random.default_rng(5).permutation(count * blocks)
        self.batch.block_table[:count, :blocks] = order.reshape(count, blocks)
        self.batch.prompt_lengths[:count] = PROMPT
        self.done = [0] * count

    def step(self, counts: dict[int, int]) -> dict[int, npt.NDArray[np.float32]]:
        """Logits of the next tokens of sequences, by sequence."""
        batch, at = self.batch, 0
        for sequence, count in counts.items():
            start = self.done[sequence]
            batch.token_ids[at : at + count] = self.ids[start : start + count]
            batch.positions[at : at + count] = np.arange(start, start + count)
            batch.sequences[at : at + count] = sequence
            self.done[sequence] += count
            at += count
        batch.logit_rows[:at] = np.arange(at)
        batch.tokens = batch.rows = at
        logits = np.array(self.executor.step(batch))
        return dict(zip(counts, np.split(logits, np.cumsum([*counts.values()])[:-1]), strict=True))

    def whole(self, sequence: int, cuts: list[int]) -> npt.NDArray[np.float32]:
        """Logits of all tokens of a sequence, which come in steps of these sizes."""
        return np.concatenate([self.step({sequence: count})[sequence] for count in cuts])


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_bits_do_not_depend_on_the_step(case: tuple[str, str], engines: dict[tuple[str, str], Path]) -> None:
    with Engine.load(engines[case], threads=2, kv_tokens=2048) as engine:
        executor = engine.executor
        ids = np.random.default_rng(3).integers(0, executor.vocab_size, LENGTH).astype(np.int32)
        expected = Sequences(executor, ids, 1).whole(0, [60, PROMPT - 60, *[1] * (LENGTH - PROMPT)])
        for cuts in ([1] * LENGTH, [33] * 3 + [21], [17, 16, 42, 20, 25], [50, 40, 30], [49, 26, 45]):
            found = Sequences(executor, ids, 1).whole(0, cuts)
            np.testing.assert_array_equal(found, expected, err_msg=str(cuts))
        batch, random = Sequences(executor, ids, 6), np.random.default_rng(4)
        while min(batch.done) < LENGTH:  # prompts beside answers, some sequences waiting, in any slots
            before = list(batch.done)
            rows = [row for row in random.permutation(6).tolist() if before[row] < LENGTH and random.random() < 0.7] or [
                int(np.argmin(before))
            ]
            chunks = {row: 1 if before[row] >= PROMPT else int(random.integers(1, 11)) for row in rows}
            counts = {row: min(count, LENGTH - before[row]) for row, count in chunks.items()}
            for row, logits in batch.step(counts).items():
                np.testing.assert_array_equal(logits, expected[before[row] : batch.done[row]])


def test_blocks_are_shared_and_copied(engines: dict[tuple[str, str], Path]) -> None:
    engine_path = engines["llama_gqa", "int8"]
    with Engine.load(engine_path, threads=2, kv_tokens=512) as engine:
        ids = random_ids(engine_path.parent / "llama_gqa", 200)
        for common in (17, 31):
            for expected, found in logits_over_copies(engine, ids, common):
                np.testing.assert_array_equal(found, expected)


def test_a_step_without_logits(engines: dict[tuple[str, str], Path]) -> None:
    with Engine.load(engines["llama_gqa", "int8"], threads=1, kv_tokens=256) as engine:
        batch = engine.executor.batch
        batch.tokens, batch.rows = 3, 0
        batch.positions[:3], batch.prompt_lengths[0] = range(3), 8
        assert np.asarray(engine.executor.step(batch)).shape == (0, engine.executor.vocab_size)


def test_the_size_of_the_cache(engines: dict[tuple[str, str], Path]) -> None:
    path = engines["llama_gqa", "int8"]
    manifest = read_manifest(path)
    request = LoadRequest(path / "rank0", manifest, threads=1, kv_memory=KvMemory(tokens=64))
    executor = executor_of(manifest).load(request)
    assert executor.num_blocks == 4 and executor.batch.max_sequences == 4
    assert executor.batch.max_context == -(-manifest.model.dimensions["max_position"] // BLOCK_SIZE) * BLOCK_SIZE
    executor.close()


def test_hosts_that_do_not_fit(engines: dict[tuple[str, str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = engines["llama_gqa", "int8"]
    with monkeypatch.context() as patch:
        patch.setattr(host, "cpu_flags", lambda: frozenset({"avx2"}))
        with pytest.raises(EngineError, match=r"found a CPU without VNNI, .* saturate, expected avx512_vnni or avx_vnni;"):
            Engine.load(path)

    def absent(package: str) -> str:
        raise PackageNotFoundError

    for version, message in (
        (absent, r"^onnxruntime: ONNX Runtime is not installed: expected onnxruntime 1\.31 or later; pip install -c "),
        (
            lambda package: "1.9.2",
            r"^onnxruntime: ONNX Runtime is too old: found 1\.9\.2, expected onnxruntime 1\.31 or later",
        ),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(onnxruntime_factory, "version", version)
            with pytest.raises(EngineError, match=message):
                Engine.load(path)
    with pytest.raises(EngineError, match=r"^onnxruntime: instruction set: found avx2, expected vnni; ONNX Runtime chooses k"):
        Engine.load(path, isa="avx2")


@pytest.mark.parametrize("name", ["model.onnx", "weights.safetensors"])
def test_truncated_files(name: str, engines: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    copy = tmp_path / "engine"
    shutil.copytree(engines["llama_gqa", "int8"], copy)
    file = copy / "rank0" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(EngineError, match=rf"^engine: size of rank0/{name}: found \d+ bytes, expected \d+ bytes; copy the"):
        Engine.load(copy)
    manifest = read_manifest(copy)
    with pytest.raises(EngineError, match=r"^onnxruntime: model .*rank0/model\.onnx cannot be loaded: found .*; copy"):
        executor_of(manifest).load(LoadRequest(copy / "rank0", manifest, threads=1))
