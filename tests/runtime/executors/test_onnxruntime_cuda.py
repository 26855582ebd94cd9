"""The executor of ONNX Runtime on GPUs over stand-ins: memory of the host, and the CPU provider, which runs the same model."""

from __future__ import annotations

import shutil
from functools import partial
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

from belle_compile.compiler.driver import BuildRequest, build
from belle_compile.runtime import Engine, SamplingParams
from belle_compile.runtime.artifact import read_manifest
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.executors import (
    LoadRequest,
    executor_of,
    gpu_host,
    onnxruntime_cuda,
    onnxruntime_factory,
    onnxruntime_sizes,
)
from belle_compile.runtime.executors.onnxruntime_cuda import GPU
from benchmarks.invariance.requests import Case, cases, longest
from benchmarks.invariance.ways import Answer, answer, ways
from tests.parity.variants import VARIANTS, hf_greedy, hf_logits, random_ids
from tests.runtime.executors.onnxruntime_gpu_host import run_on_the_host
from tests.runtime.executors.tensorrt_host import HostDevice

FIXTURE = Path(__file__).parents[2] / "fixtures" / "tiny-bloom-trained"
WAYS = ("alone and cold", "few blocks, others given up", "prefix hits, streamed")
NAMES = ("bloom", "llama_gqa", "llama_dynamic_rope")
GREEDY = SamplingParams(temperature=0, max_new_tokens=6, ignore_eos=True, repetition_penalty=1.0)
HALF = 1e-2  # of the largest logit, in float16


def built(checkpoint: Path, folder: Path, quantization: str) -> Path:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(onnxruntime_sizes, "MOST_GPU_CONTEXT", 256)  # the CPU provider is slow with long biases
        request = BuildRequest(checkpoint, folder / "engine", "a100", quantization, backend="onnxruntime", drift=False)
        return build(request)


@pytest.fixture(scope="module", params=NAMES)
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint, and its engine without quantization."""
    checkpoint = VARIANTS[request.param](tmp_path_factory.mktemp("checkpoints") / request.param)
    return checkpoint, built(checkpoint, tmp_path_factory.mktemp("engines"), "none")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(FIXTURE, tmp_path_factory.mktemp("trained"), "int8")


def test_answers_are_those_of_transformers(variant: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, engine = variant
    run_on_the_host(monkeypatch)
    prompts = [random_ids(checkpoint, length, length) for length in (5, 100, 1, 17, 30, 2, 64, 9, 33, 40)]  # more than slots
    with Engine.load(engine) as loaded:
        logits, expected = loaded.logits(prompts[1]), hf_logits(checkpoint, prompts[1])
        assert abs(logits - expected).max() < HALF * abs(expected).max()
        results = loaded.generate(prompts, GREEDY)
    for prompt, result in zip(prompts[:4], results, strict=False):
        assert list(result.token_ids) == hf_greedy(checkpoint, prompt, len(result.token_ids))


def test_answers_depend_on_the_request_alone(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_on_the_host(monkeypatch)
    lines = (FIXTURE / "heldout-zh.txt").read_text(encoding="utf-8").splitlines()
    calls: list[Case] = cases([line for line in lines if line.strip()], 8, 24)
    expected: list[Answer] = []
    for name in WAYS:
        answers, facts = answer(ways()[name], partial(Engine.load, trained), calls, longest(trained, calls))
        expected = expected or answers
        assert all(one.same(other) for one, other in zip(expected, answers, strict=True)), f"{name}: {facts}"


def test_each_kind_of_run_has_one_shape(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_on_the_host(monkeypatch)
    ids = [3 + token % 200 for token in range(150)]
    with Engine.load(trained) as loaded:
        executor: Any = loaded.executor
        run, shapes = executor._session.run_with_iobinding, set()

        def recorded(binding: Any) -> None:
            run(binding)
            shapes.add(tuple(value.shape()[0] for value in binding.get_outputs()[:2]))

        monkeypatch.setattr(executor._session, "run_with_iobinding", recorded)
        loaded.generate([ids[:40], ids[:7], ids], GREEDY)
        whole = loaded.logits(ids)[-1]
        assert (loaded.logits(ids)[-1] == whole).all()
    assert len(shapes) == 2


def test_the_cache_is_updated_in_place(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only inputs and logits are copied in a step, once each."""
    run_on_the_host(monkeypatch)
    copied: list[int] = []
    for name in ("upload", "download", "copy", "copy_box"):
        plain = getattr(HostDevice, name)

        def counted(*arguments: Any, plain: Any = plain, name: str = name) -> None:
            copied.append(arguments[3] if name == "copy" else getattr(arguments[2], "nbytes", 0) or arguments[1].nbytes)
            plain(*arguments)

        monkeypatch.setattr(HostDevice, name, counted)
    manifest = read_manifest(trained)
    executor = executor_of(manifest).load(LoadRequest(trained / "rank0", manifest))
    batch = executor.batch
    batch.token_ids[:20], batch.positions[:20], batch.prompt_lengths[0], batch.block_table[0, :2] = 5, range(20), 20, (3, 1)
    batch.tokens, batch.rows, batch.logit_rows[0] = 20, 1, 19
    executor.step(batch)
    copied.clear()
    batch.tokens, batch.positions[0], batch.logit_rows[0] = 1, 20, 0
    logits = np.asarray(executor.step(batch))
    assert logits.shape == (1, executor.vocab_size) and np.isfinite(logits).all()
    assert len(copied) == 2 and max(copied) == logits.nbytes
    executor.close()


def test_tokens_that_fill_up_a_prompt_destroy_no_block(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_on_the_host(monkeypatch)
    manifest = read_manifest(trained)
    executor = executor_of(manifest).load(LoadRequest(trained / "rank0", manifest))
    batch, ids, blocks = executor.batch, list(range(3, 107)), range(7)

    def prompt(row: int, table: Any, start: int, tokens: list[int]) -> Any:
        count = len(tokens)
        batch.block_table[row, : len(table)], batch.prompt_lengths[row] = table, 256
        batch.token_ids[:count], batch.positions[:count], batch.sequences[:count] = tokens, range(start, start + count), row
        batch.tokens, batch.rows, batch.logit_rows[0] = count, 1, count - 1
        return np.array(executor.step(batch))

    prompt(0, blocks, 0, ids[:100])
    expected = prompt(0, blocks, 100, ids[100:])
    prompt(0, [20], 0, ids[:5])  # in the slot that alone has the blocks of the longer prompt
    np.testing.assert_array_equal(prompt(1, blocks, 100, ids[100:]), expected)
    executor.close()


def test_the_size_of_the_cache(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_on_the_host(monkeypatch)
    with Engine.load(trained, kv_tokens=64) as loaded:
        assert loaded.executor.num_blocks == 4 and loaded.executor.batch.max_context == 256
    with Engine.load(trained) as loaded:
        assert loaded.executor.num_blocks == 8 * 256 // 16, "no more than all sequences can have"
    with pytest.raises(
        EngineError, match=r"kv_tokens: found 9000000 tokens, .* free beside the model \(.* GiB\) and the slots"
    ):
        Engine.load(trained, kv_tokens=9_000_000)


def test_kernels_name_what_bits_depend_on(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_on_the_host(monkeypatch)
    with Engine.load(trained, kv_tokens=64) as loaded:
        first = loaded.executor.kernels
    monkeypatch.setenv("ORT_DISABLE_FLASH_ATTENTION", "1")
    with Engine.load(trained, kv_tokens=64) as loaded:
        assert loaded.executor.kernels != first and "sm_80" in first


def absent(package: str) -> str:
    raise PackageNotFoundError


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (absent, r"^onnxruntime: ONNX Runtime is not installed: expected onnxruntime-gpu 1\.31 or later; pip install"),
        (lambda package: "1.30.2", r"^onnxruntime: ONNX Runtime is too old: found 1\.30\.2, expected onnxruntime-gpu 1\.31 or"),
    ],
)
def test_a_runtime_that_is_missing_or_too_old(
    version: Any, message: str, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime_factory, "version", version)
    with pytest.raises(EngineError, match=message + r".* '\.\[onnxruntime-gpu\]'\.$"):
        Engine.load(trained)


def test_a_host_without_a_gpu(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime_cuda, "providers", lambda: [GPU.provider])
    manifest = read_manifest(trained)
    with pytest.raises(EngineError, match=r"^cuda: no NVIDIA driver on this host: found no libcuda.so.1; install NVIDIA's dr"):
        Engine.load(trained)
    with pytest.raises(
        EngineError, match=r"a100-40g: found no NVIDIA driver .*, expected an NVIDIA GPU and its driver; install"
    ):
        executor_of(manifest).try_host(manifest.target)
    monkeypatch.setattr(gpu_host, "open_device", HostDevice)
    assert executor_of(manifest).try_host(manifest.target) == "cuda"
    monkeypatch.setattr(HostDevice, "memory_bytes", 1 << 20)
    with pytest.raises(EngineError, match=r"found 0\.0 GiB of free memory on a host, expected 0\.6 GiB; end what else runs on"):
        executor_of(manifest).try_host(manifest.target)
    with pytest.raises(EngineError, match=r"^onnxruntime: instruction set: found sm_80, expected cuda; ONNX Runtime chooses k"):
        Engine.load(trained, isa="sm_80")


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_does_not_load(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime falls back to the CPU where it may: here it may not."""
    monkeypatch.setattr(onnxruntime_cuda, "providers", lambda: [GPU.provider])
    monkeypatch.setattr(onnxruntime_cuda, "open_device", HostDevice)
    with pytest.raises(EngineError, match=r"model .* cannot be loaded on the GPU: found .*; see that the libraries of CUDA"):
        Engine.load(trained)


def test_truncated_files(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_on_the_host(monkeypatch)
    shutil.copytree(trained / "rank0", tmp_path / "rank0")
    file = tmp_path / "rank0" / "model.onnx"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    manifest = read_manifest(trained)
    with pytest.raises(EngineError, match=r"^onnxruntime: model .*rank0/model\.onnx cannot be loaded on the GPU: found "):
        executor_of(manifest).load(LoadRequest(tmp_path / "rank0", manifest))
