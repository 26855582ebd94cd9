"""Engines with adapters that are not merged: logits, bits, caches, loading and unloading, and the server."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from belle_compile.compiler.driver import BuildRequest, build
from belle_compile.runtime import Engine, SamplingParams
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.server.options import ServerOptions
from belle_compile.runtime.server.service import Service
from belle_compile.runtime.serving.adapters import AdapterBusy, UnknownAdapter
from belle_compile.runtime.serving.result_cache.options import ResultCacheOptions
from tests.compiler.checkpoint.overlays.adapters import edit_config, edit_tensors, make_adapter, peft_logits
from tests.parity.engines import BEST_ISA, Builder, EngineStepper
from tests.parity.variants import hf_logits, random_ids
from tests.runtime.server.serving import WAIT_S, post, run

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=8, ignore_eos=True)
RANK = 8
ANSWERS = 200


def make_engine(builder: Builder, variant: str, quantization: str, **options: Any) -> Path:
    out = builder.root / f"{variant}-{quantization}-adapters"
    request = BuildRequest(
        builder.checkpoint(variant), out, quantization=quantization, isas=(BEST_ISA,), lora_rank=RANK, **options
    )
    return build(request)


@pytest.fixture(scope="module")
def engine(builder: Builder) -> Path:
    return make_engine(builder, "llama_gqa", "int8")


@pytest.fixture(scope="module")
def adapters(builder: Builder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of other modules and ranks."""
    base, folder = builder.checkpoint("llama_gqa"), tmp_path_factory.mktemp("adapters")
    configs: dict[str, dict[str, Any]] = {
        "all": {"target_modules": "all-linear", "r": 5},
        "values": {"target_modules": ["q_proj", "v_proj"], "r": 8, "use_rslora": True},
        "down": {"target_modules": ["down_proj"], "r": 2, "rank_pattern": {"layers.1.mlp.down_proj": 3}},
    }
    return {name: make_adapter(base, folder / name, seed=seed, **config) for seed, (name, config) in enumerate(configs.items())}


@pytest.fixture(scope="module")
def loaded(engine: Path, adapters: dict[str, Path]) -> Iterator[Engine]:
    cache = ResultCacheOptions()
    with Engine.load(engine, threads=2, kv_tokens=1024, lora=adapters, max_loras=4, result_cache=cache) as opened:
        yield opened


@contextlib.contextmanager
def busy_with(engine: Engine, adapter: str, prompt: list[int]) -> Iterator[None]:
    """While the block runs, many answers with an adapter are under way."""
    params = [
        SamplingParams(temperature=1.0, seed=seed, max_new_tokens=100, ignore_eos=True, adapter=adapter)
        for seed in range(ANSWERS)
    ]
    thread = threading.Thread(target=engine.generate, args=([prompt] * ANSWERS, params))
    thread.start()
    while not engine.stats().running:
        assert thread.is_alive()
        time.sleep(0.001)
    try:
        yield
    finally:
        thread.join(WAIT_S)
        assert not thread.is_alive()


def mean_error(found: Any, expected: Any) -> float:
    return float(np.abs(found - expected).mean())


@pytest.mark.parametrize("variant", ["bloom", "mistral", "qwen3", "internlm2"])
def test_unquantized_logits_are_those_of_the_merged_model(variant: str, builder: Builder, tmp_path: Path) -> None:
    base = builder.checkpoint(variant)
    modules = {"bloom": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]}.get(variant, "all-linear")
    adapter, ids = make_adapter(base, tmp_path / "adapter", target_modules=modules, r=RANK), random_ids(base, 40)
    out = make_engine(builder, variant, "none", lora_targets=tuple(modules) if variant == "bloom" else ())
    with Engine.load(out, threads=2, kv_tokens=256, lora={"tuned": adapter}) as opened:
        found, without = opened.logits(ids, adapter="tuned"), opened.logits(ids)
    assert np.abs(found - peft_logits(base, [(adapter, 1.0)], ids)).max() < 1e-4
    assert np.abs(without - hf_logits(base, ids)).max() < 1e-4
    assert np.abs(found - without).max() > 1


def test_int8_logits_have_the_error_of_the_quantized_base(builder: Builder, loaded: Engine, adapters: dict[str, Path]) -> None:
    base = builder.checkpoint("llama_gqa")
    ids = random_ids(base, 40)
    of_base = mean_error(loaded.logits(ids), hf_logits(base, ids))
    for name, directory in adapters.items():
        expected = peft_logits(base, [(directory, 1.0)], ids)
        assert mean_error(loaded.logits(ids, adapter=name), expected) < 1.5 * of_base
        assert mean_error(loaded.logits(ids), expected) > 3 * of_base, "the adapter changes something"


def test_a_model_without_adapters_is_that_of_an_engine_without_them(builder: Builder, loaded: Engine, adapters: Any) -> None:
    ids = random_ids(builder.checkpoint("llama_gqa"), 40)
    with Engine.load(builder.engine("llama_gqa", "int8"), threads=2, kv_tokens=256) as plain:
        np.testing.assert_array_equal(loaded.logits(ids), plain.logits(ids))
        calls = [(call.kernel, call.node) for call in plain.executor.program.calls]  # type: ignore[attr-defined]
    program = loaded.executor.program  # type: ignore[attr-defined]
    assert [(call.kernel, call.node) for call in program.calls if call.when != "adapted"] == calls
    adapted = [call for call in program.calls if call.when == "adapted"]
    assert len(adapted) == 4 * 3 and program.kernel_calls.after_fusion == len(calls)


def test_bits_do_not_depend_on_the_batch(builder: Builder, loaded: Engine) -> None:
    base = builder.checkpoint("llama_gqa")
    names = [None, "all", "values", "down", "all", None]
    prompts = [random_ids(base, 5 + 7 * i) for i in range(len(names))]
    params = [SamplingParams(temperature=0.0, max_new_tokens=8, ignore_eos=True, adapter=name, logprobs=3) for name in names]
    together = loaded.generate(prompts, params)
    for prompt, param, result in zip(prompts, params, together, strict=True):
        (alone,) = loaded.generate([prompt], [param])
        assert (alone.token_ids, alone.logprobs) == (result.token_ids, result.logprobs)


def test_a_mixed_step_computes_each_row_with_its_adapter(builder: Builder, engine: Path, adapters: dict[str, Path]) -> None:
    ids = random_ids(builder.checkpoint("llama_gqa"), 6)
    names = ["all", "values", "down"]
    with Engine.load(engine, threads=2, kv_tokens=1024, lora={name: adapters[name] for name in names}) as opened:
        expected = [opened.logits(ids, adapter=name) for name in names] + [opened.logits(ids)]
        batch = opened.executor.batch
        assert batch.adapters is not None and (batch.adapters == -1).all(), "sequences that ended have left nothing"
        batch.adapters[:4] = [0, 1, 2, -1]
        found = EngineStepper(opened, 4).step({sequence: ids for sequence in range(4)})
    for sequence, logits in enumerate(expected):
        np.testing.assert_array_equal(found[sequence], logits)


def test_caches_keep_adapters_apart(builder: Builder, engine: Path, adapters: dict[str, Path]) -> None:
    prompt = random_ids(builder.checkpoint("llama_gqa"), 48)
    cache = ResultCacheOptions()
    with Engine.load(engine, threads=2, kv_tokens=1024, lora={"a": adapters["all"]}, max_loras=2, result_cache=cache) as opened:
        with_a = SamplingParams(temperature=0.0, max_new_tokens=8, ignore_eos=True, adapter="a")
        base, first = (opened.generate([prompt], params)[0] for params in (GREEDY, with_a))
        assert base.token_ids != first.token_ids and not first.cached and first.cached_tokens == 0
        assert opened.generate([prompt], with_a)[0].cached
        assert opened.adapters is not None
        opened.adapters.load("b", adapters["all"])  # the same files: the same answers, stored ones too
        same = opened.generate([prompt], SamplingParams(temperature=0.0, max_new_tokens=8, ignore_eos=True, adapter="b"))[0]
        assert same.cached and same.token_ids == first.token_ids
        opened.adapters.load("half", adapters["all"], 0.5)
        half = opened.resolve(prompt, SamplingParams(adapter="half"))
        assert half.adapter != opened.resolve(prompt, with_a).adapter
        assert opened.resolve(prompt, with_a) == opened.resolve(prompt, SamplingParams(**{**vars(with_a), "adapter": "b"}))
        assert half.key(opened.identity) != opened.resolve(prompt, SamplingParams()).key(opened.identity)


def test_loading_and_unloading_while_requests_run(builder: Builder, engine: Path, adapters: dict[str, Path]) -> None:
    prompt = random_ids(builder.checkpoint("llama_gqa"), 9)
    long = SamplingParams(temperature=0.0, max_new_tokens=60, ignore_eos=True, adapter="a")
    with Engine.load(engine, threads=2, kv_tokens=1024, lora={"a": adapters["all"]}, max_loras=2) as opened:
        loading = opened.adapters
        assert loading is not None
        expected = opened.generate([prompt], long)[0].token_ids
        with busy_with(opened, "a", prompt):
            with pytest.raises(AdapterBusy, match=r"adapter a is in use: found \d+ requests; try again when they have ended"):
                loading.unload("a")
            loading.load("b", adapters["values"])
            with pytest.raises(EngineError, match=r"too many adapters: found 2 loaded; unload one"):
                loading.load("c", adapters["down"])
            with pytest.raises(EngineError, match="an adapter b is loaded already"):
                loading.load("b", adapters["down"])
            assert opened.generate([prompt], long)[0].token_ids == expected
        loading.unload("a")
        assert [*loading.loaded] == ["b"]
        with pytest.raises(UnknownAdapter, match="no adapter of this name is loaded: found 'a', expected b"):
            opened.generate([prompt], long)
        loading.load("c", adapters["down"])  # in the slot that is free now
        loading.unload("c")
        loading.load("a", adapters["all"])
        assert opened.generate([prompt], long)[0].token_ids == expected


# What is wrong with a copy of the adapter of q_proj and v_proj, and the sentence.
WRONG: dict[str, tuple[dict[str, Any], Any, str]] = {
    "dora": ({"use_dora": True}, None, r"found DoRA, expected factors of linear layers alone; merge it at build time"),
    "saved": ({"modules_to_save": ["lm_head"]}, None, r"found modules_to_save \(lm_head\), expected factors"),
    "rows": ({"trainable_token_indices": [3]}, None, r"found trained rows of tables"),
    "method": ({"peft_type": "IA3"}, None, r"found an adapter of IA3, expected a LoRA adapter"),
    "rank": ({"r": 64}, None, r"found rank 64 in .*, expected at most 8, what the engine was built for"),
    "shape": ({"r": 4}, None, r"found shape \[8, 72\] of .*lora_A\.weight, expected \[4, 72\]"),
    "half": ({}, lambda t: {k: v for k, v in t.items() if "lora_B" not in k}, r"found no .*lora_B\.weight, expected both"),
    "fewer": (
        {},
        lambda t: {k: v for k, v in t.items() if "v_proj" not in k},
        r"no changes of .*v_proj.*; it belongs",
    ),
    "more": ({"target_modules": ["q_proj"]}, None, r"found changes of .*v_proj, expected only those"),
    "foreign": (
        {},
        lambda t: {k.replace("q_proj", "query"): v for k, v in t.items()},
        r"changes of .*query, expected",
    ),
    "nan": ({}, lambda t: {k: v * float("nan") for k, v in t.items()}, r"found NaN or infinity in"),
    "other": (
        {},
        lambda t: t | {"base_model.model.lm_head.weight": next(iter(t.values())).clone()},
        r"a tensor .*lm_head",
    ),
}


@pytest.mark.parametrize("wrong", sorted(WRONG))
def test_adapters_that_do_not_fit_are_refused(wrong: str, loaded: Engine, adapters: dict[str, Path], tmp_path: Path) -> None:
    config, change, message = WRONG[wrong]
    copy = tmp_path / "copy"
    shutil.copytree(adapters["values"], copy)
    edit_config(copy, **config)
    if change is not None:
        edit_tensors(copy, change)
    assert loaded.adapters is not None
    with pytest.raises(EngineError, match=message) as caught:
        loaded.adapters.load("wrong", copy)
    assert "\n" not in str(caught.value) and "wrong" not in loaded.adapters.loaded


def test_damaged_files_and_engines_without_room(builder: Builder, engine: Path, adapters: Any, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"engine takes no adapters: found no adapters\.safetensors; build it .*--lora-rank"):
        Engine.load(builder.engine("llama_gqa", "int8"), kv_tokens=64, lora={"a": adapters["all"]})
    with Engine.load(engine, kv_tokens=64) as opened, pytest.raises(EngineError, match="the engine has no adapters: found 'a'"):
        opened.resolve([5], SamplingParams(adapter="a"))
    copy = tmp_path / "copy"
    shutil.copytree(adapters["all"], copy)
    file = copy / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(EngineError, match=r"adapter_model\.safetensors: found a file that does not parse"):
        Engine.load(engine, kv_tokens=64, lora={"a": copy})
    file.rename(copy / "adapter_model.bin")
    with pytest.raises(EngineError, match=r"found adapter_model\.bin, expected adapter_model\.safetensors; save it again"):
        Engine.load(engine, kv_tokens=64, lora={"a": copy})
    with pytest.raises(EngineError, match=r"file .*adapter_config\.json cannot be read"):
        Engine.load(engine, kv_tokens=64, lora={"a": tmp_path / "missing"})


def test_the_server(builder: Builder, engine: Path, adapters: dict[str, Path]) -> None:
    options = ServerOptions(served_model_names=("base",), allow_lora_updates=True, api_keys=("secret",))
    key = {"authorization": "Bearer secret"}
    body = {"prompt": random_ids(builder.checkpoint("llama_gqa"), 12), "max_tokens": 6, "temperature": 0, "ignore_eos": True}
    with Engine.load(engine, threads=2, kv_tokens=512, lora={"a": adapters["all"]}, max_loras=2) as opened:
        service = Service(opened, options)
        try:
            answers = {name: post(service, "/v1/completions", body | {"model": name}, **key).json() for name in ("base", "a")}
            assert answers["a"]["model"] == "a" and answers["a"]["choices"] != answers["base"]["choices"]
            load = {"lora_name": "b", "lora_path": str(adapters["values"])}
            assert post(service, "/v1/load_lora_adapter", load).status_code == 401
            made = post(service, "/v1/load_lora_adapter", load, **key)
            assert (made.status_code, made.json()["id"], made.json()["parent"]) == (200, "b", "base")
            models = run(service, lambda client: client.get("/v1/models", headers=key)).json()["data"]
            assert [(model["id"], model.get("parent")) for model in models] == [("base", None), ("a", "base"), ("b", "base")]
            assert post(service, "/v1/completions", body | {"model": "b"}, **key).status_code == 200
            again = post(service, "/v1/load_lora_adapter", load, **key)
            assert again.status_code == 400 and "is loaded already" in again.json()["error"]["message"]
            named = post(service, "/v1/load_lora_adapter", load | {"lora_name": "base"}, **key)
            assert named.status_code == 400 and named.json()["error"]["param"] == "lora_name"
            assert post(service, "/v1/unload_lora_adapter", {"lora_name": "b"}, **key).json()["id"] == "b"
            assert post(service, "/v1/unload_lora_adapter", {"lora_name": "b"}, **key).status_code == 404
            gone = post(service, "/v1/completions", body | {"model": "b"}, **key)
            assert gone.status_code == 404 and gone.json()["error"]["code"] == "model_not_found"
            with busy_with(opened, "a", body["prompt"]):
                busy = post(service, "/v1/unload_lora_adapter", {"lora_name": "a"}, **key)
            assert (busy.status_code, busy.json()["error"]["code"]) == (409, "adapter_in_use")
        finally:
            service.close()
        closed = Service(opened, ServerOptions())
        try:
            assert post(closed, "/v1/load_lora_adapter", load).status_code == 403
            assert post(closed, "/v1/unload_lora_adapter", {"lora_name": "a"}).status_code == 403
        finally:
            closed.close()
