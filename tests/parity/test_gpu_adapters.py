"""Engines for GPUs with adapters that are not merged, their kernels interpreted: logits, mixed steps, loading, the server."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")

from belle_compile.compiler.backends.triton import lower
from belle_compile.compiler.driver import BuildRequest, build
from belle_compile.runtime import Engine, SamplingParams
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.executors import cuda_adapters
from belle_compile.runtime.server.options import ServerOptions
from belle_compile.runtime.server.service import Service
from tests.compiler.checkpoint.overlays.adapters import make_adapter, peft_logits
from tests.interpreted import InterpretedDevice, interpreted_gpu
from tests.parity.engines import Builder, EngineStepper
from tests.parity.stepping import relative_error
from tests.parity.variants import hf_logits, random_ids
from tests.runtime.server.serving import WAIT_S, post

TOLERANCE = 2e-5  # of the largest logit
RANK = 6

__all__ = ["interpreted_gpu"]


def make(builder: Builder, variant: str, out: Path, quantization: str = "none", **options: Any) -> Path:
    request = BuildRequest(builder.checkpoint(variant), out, "a100x1", quantization, lora_rank=RANK, **options)
    return build(request)


@pytest.fixture(scope="module")
def adapters(builder: Builder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of other modules and ranks."""
    base, folder = builder.checkpoint("llama_gqa"), tmp_path_factory.mktemp("adapters")
    configs: dict[str, dict[str, Any]] = {
        "all": {"target_modules": "all-linear", "r": 5},
        "values": {"target_modules": ["q_proj", "v_proj"], "r": 6, "use_rslora": True},
        "down": {"target_modules": ["down_proj"], "r": 2, "rank_pattern": {"layers.1.mlp.down_proj": 3}},
    }
    return {name: make_adapter(base, folder / name, seed=seed, **config) for seed, (name, config) in enumerate(configs.items())}


def test_unquantized_logits_are_those_of_the_merged_model(
    builder: Builder, tmp_path: Path, interpreted_gpu: InterpretedDevice
) -> None:
    base = builder.checkpoint("bloom")
    modules = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
    adapter, ids = make_adapter(base, tmp_path / "adapter", target_modules=modules, r=RANK), random_ids(base, 12)
    with Engine.load(make(builder, "bloom", tmp_path / "engine"), kv_tokens=256, lora={"tuned": adapter}) as engine:
        found, without = engine.logits(ids, adapter="tuned"), engine.logits(ids)
    assert np.abs(found - peft_logits(base, [(adapter, 1.0)], ids)).max() < 1e-4
    assert np.abs(without - hf_logits(base, ids)).max() < 1e-4
    assert np.abs(found - without).max() > 1


def test_a_mixed_step_computes_each_row_with_its_adapter(
    builder: Builder, tmp_path: Path, adapters: dict[str, Path], interpreted_gpu: InterpretedDevice
) -> None:
    """Prompts, then tokens of all of them beside another prompt, as PEFT computes each alone."""
    base = builder.checkpoint("llama_gqa")
    names, ids = [*adapters, None], random_ids(base, 9)
    expected = [peft_logits(base, [(adapters[name], 1.0)], ids) if name else hf_logits(base, ids) for name in names]
    with Engine.load(make(builder, "llama_gqa", tmp_path / "engine"), kv_tokens=1024, lora=adapters) as engine:
        batch = engine.executor.batch
        assert batch.adapters is not None
        batch.adapters[:5] = [0, 1, 2, -1, 1]
        stepper = EngineStepper(engine, 5)
        steps: list[dict[int, slice]] = [
            {sequence: slice(0, 3 + sequence) for sequence in range(4)},
            {**{sequence: slice(3 + sequence, 4 + sequence) for sequence in range(4)}, 4: slice(0, 7)},
            {sequence: slice(4 + sequence, 9) for sequence in (0, 3)},
        ]
        for step in steps:
            for sequence, logits in stepper.step({sequence: ids[part] for sequence, part in step.items()}).items():
                wanted = expected[1 if sequence == 4 else sequence][step[sequence]]
                assert relative_error(logits, wanted) < TOLERANCE
    assert {"shrink", "expand"} <= set(interpreted_gpu.started)


def test_int8_logits_have_the_error_of_the_quantized_base(
    builder: Builder,
    tmp_path: Path,
    adapters: dict[str, Path],
    interpreted_gpu: InterpretedDevice,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where q, k and v are more linears than one call takes."""
    monkeypatch.setattr(lower, "MOST_PARTS", 2)
    base = builder.checkpoint("llama_gqa")
    ids = random_ids(base, 8)

    def error(logits: Any, expected: Any) -> float:
        return float(np.abs(logits - expected).mean())

    with Engine.load(make(builder, "llama_gqa", tmp_path / "engine", "int8"), kv_tokens=256, lora=adapters) as engine:
        of_base = error(engine.logits(ids), hf_logits(base, ids))
        expected = peft_logits(base, [(adapters["all"], 1.0)], ids)
        interpreted_gpu.started.clear()
        assert error(engine.logits(ids, adapter="all"), expected) < 1.5 * of_base
        assert interpreted_gpu.started.count("shrink") == 3 * 5, "q and k, v, o, gate and up, down of each layer"
        assert error(hf_logits(base, ids), expected) > 3 * of_base, "the adapter changes something"


def test_what_has_no_adapter_pays_nothing(
    builder: Builder, tmp_path: Path, adapters: dict[str, Path], interpreted_gpu: InterpretedDevice
) -> None:
    ids, sizes = random_ids(builder.checkpoint("llama_gqa"), 3), []
    upload = interpreted_gpu.upload
    interpreted_gpu.upload = lambda address, source: sizes.append(source.nbytes) or upload(address, source)  # type: ignore
    found = []
    plain = build(BuildRequest(builder.checkpoint("llama_gqa"), tmp_path / "plain", "a100x1", "int8"))
    out = make(builder, "llama_gqa", tmp_path / "engine", "int8", lora_targets=("q_proj", "v_proj", "down_proj"))
    for directory, loaded in ((plain, None), (out, {"values": adapters["values"]})):
        interpreted_gpu.started.clear()
        with Engine.load(directory, kv_tokens=256, lora=loaded) as engine:
            logits, calls = engine.logits(ids), engine.executor.program.calls  # type: ignore[attr-defined]
            found.append((logits.tobytes(), list(interpreted_gpu.started), sizes[-1],
                          [(call.kernel, call.node) for call in calls if call.when != "adapted"]))  # fmt: skip
            if loaded:
                interpreted_gpu.started.clear()
                engine.logits(ids, adapter="values")
    assert found[0] == found[1], "the same bits, kernels, copies and calls"
    layers, started = 3, interpreted_gpu.started
    assert started.count("shrink") == started.count("expand") == layers, "one for q and v, none for what is not changed"


def test_adapters_come_and_go_without_new_recordings(
    builder: Builder, tmp_path: Path, interpreted_gpu: InterpretedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slot is written in pieces; steps that were recorded before find what is in it then."""
    monkeypatch.setattr(cuda_adapters, "_PIECE", 30_000)
    base = builder.checkpoint("llama")
    ids, modules = random_ids(base, 3), ["q_proj", "down_proj"]
    first, second = (make_adapter(base, tmp_path / f"{n}", seed=n, target_modules=modules, r=3 + n) for n in (1, 2))
    other = make_adapter(base, tmp_path / "other", target_modules=["up_proj"])
    recorded: list[int] = []
    record = interpreted_gpu.record
    interpreted_gpu.record = lambda run: recorded.append(1) or record(run)  # type: ignore[method-assign, assignment]
    directory = make(builder, "llama", tmp_path / "engine")
    with Engine.load(directory, kv_tokens=256, lora={"a": first}, max_loras=2) as engine:
        loading = engine.adapters
        assert loading is not None
        of_first, plain = engine.logits(ids, adapter="a"), engine.logits(ids)
        so_far = len(recorded)
        loading.load("b", second)
        with pytest.raises(EngineError, match=r"too many adapters: found 2 loaded; unload one"):
            loading.load("c", other)
        of_second = engine.logits(ids, adapter="b")
        loading.unload("a")
        loading.load("c", first, 0.0)  # in the slot of the first
        np.testing.assert_array_equal(engine.logits(ids, adapter="c"), plain)
        np.testing.assert_array_equal(engine.logits(ids, adapter="b"), of_second)
        loading.unload("c")
        loading.load("a", first)
        np.testing.assert_array_equal(engine.logits(ids, adapter="a"), of_first)
        assert len(recorded) == so_far and np.abs(of_second - of_first).max() > 0.1, "addresses are the same"
        loading.unload("b")
        loading.load("other", other)
        assert np.abs(engine.logits(ids, adapter="other") - plain).max() > 0.1
        assert len(recorded) == so_far + 1, "changes of other layers"


def test_answers_go_on_while_adapters_are_loaded_and_unloaded(
    builder: Builder, tmp_path: Path, interpreted_gpu: InterpretedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = builder.checkpoint("llama")
    ids = random_ids(base, 3)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], r=2)
    params = SamplingParams(temperature=0.0, max_new_tokens=6, ignore_eos=True, adapter="a")
    directory = make(builder, "llama", tmp_path / "engine", lora_targets=("q_proj",))
    monkeypatch.setattr(cuda_adapters, "_PIECE", 5000)
    with Engine.load(directory, kv_tokens=256, lora={"a": adapter}, max_loras=2) as engine, ThreadPoolExecutor(1) as thread:
        loading = engine.adapters
        assert loading is not None
        (expected,) = engine.generate([ids], params)
        running = thread.submit(engine.generate, [ids], params)
        while not engine.stats().running and not running.done():
            time.sleep(0.001)
        assert not running.done()
        loading.load("b", adapter, 2.0)
        loading.unload("b")
        assert running.result(WAIT_S)[0].token_ids == expected.token_ids


def test_caches_and_the_server(
    builder: Builder, tmp_path: Path, interpreted_gpu: InterpretedDevice, adapters: dict[str, Path]
) -> None:
    prompt = random_ids(builder.checkpoint("llama_gqa"), 18)
    body = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 1}
    directory = make(builder, "llama_gqa", tmp_path / "engine", lora_targets=("q_proj", "v_proj"))
    with Engine.load(directory, kv_tokens=256, lora={"a": adapters["values"]}, max_loras=2) as engine:
        service = Service(engine, ServerOptions(served_model_names=("base",), allow_lora_updates=True))
        try:
            answers = {name: post(service, "/v1/completions", body | {"model": name}).json() for name in ("base", "a", "a")}
            assert answers["a"]["model"] == "a" and answers["a"]["choices"] != answers["base"]["choices"]
            load = {"lora_name": "b", "lora_path": str(adapters["values"]), "lora_scale": 0.0}
            assert post(service, "/v1/load_lora_adapter", load).status_code == 200
            of_b = post(service, "/v1/completions", body | {"model": "b"}).json()
            assert of_b["choices"] == answers["base"]["choices"]
            assert post(service, "/v1/unload_lora_adapter", {"lora_name": "b"}).status_code == 200
            assert post(service, "/v1/completions", body | {"model": "b"}).status_code == 404
        finally:
            service.close()
        (again,) = engine.generate([prompt], SamplingParams(max_new_tokens=1, adapter="a"))
        assert again.cached_tokens >= 16, "prompts with the same adapter share blocks"


def test_slots_take_memory_from_the_cache(
    builder: Builder, tmp_path: Path, adapters: dict[str, Path], interpreted_gpu: InterpretedDevice
) -> None:
    directory = make(builder, "llama_gqa", tmp_path / "engine")
    with Engine.load(directory, kv_cache_memory="50%") as engine:
        blocks, slot = engine.executor.num_blocks, engine.executor.program.adapters.slot_bytes  # type: ignore[attr-defined]
        block = engine.executor.kv_block_bytes
    with Engine.load(directory, kv_cache_memory="50%", max_loras=50) as engine:
        assert abs(blocks - engine.executor.num_blocks - 50 * slot / 2 / block) <= 1
    with pytest.raises(
        EngineError, match=r"kv_tokens: found .* beside weights \(.* GiB\), adapters \(\d+\.\d+ GiB\) and activ"
    ):
        Engine.load(directory, kv_tokens=16, max_loras=(1 << 30) // slot)
