"""Arguments of a wrong type: one sentence that names the argument, before anything is submitted."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from belle_compile.runtime import Engine, EngineError, Result, SamplingParams
from belle_compile.runtime.serving.result_cache.options import ResultCacheOptions
from tests.runtime.fakes import make_engine

GREEDY = SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=3)
USER = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with make_engine() as engine:
        yield engine


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (None, r"prompts: found None \(NoneType\), expected text, chat messages or token ids, or a list of these"),
        (b"hi", r"prompts: found bytes, expected .*; decode it first"),
        (bytearray(b"hi"), "prompts: found bytearray"),
        (5, r"prompts: found 5 \(int\)"),
        ({"hi"}, "prompts: found set"),
        (frozenset({"hi", "you"}), "prompts: found frozenset"),
        ((prompt for prompt in ["hi"]), "prompts: found generator"),
        ({"role": "user", "content": "hi"}, "prompts: found dict"),
        (USER.items(), "prompts: found dict_items"),
        (object(), "prompts: found object"),
        (np.float32(3), r"prompts: found float32 of float32 without dimensions"),
        (["hi", None], r"prompts\[1\]: found None \(NoneType\), expected text, chat messages or token ids"),
        (["hi", b"hi"], r"prompts\[1\]: found bytes, .*; decode it first"),
        (["hi", 5], r"prompts\[1\]: found 5 \(int\)"),
        ([["hi"]], r"the prompt: found str in place 0"),
        ([[1, 2], {3, 4}], r"prompts\[1\]: found set"),
        ([[1, "a"]], "the prompt: found str in place 1"),
        ([[1, None]], "the prompt: found NoneType in place 1"),
        ([[True, 5]], "the prompt: found bool in place 0"),
        ([5, 1.5], "the prompt: found float in place 1"),
        ([1.5], "the prompt: found float in place 0"),
        ([[1], [[2], [3, 4]]], "the prompt: found list in place 0"),
        ([2**70], "a token id: found 1180591620717411303424, expected 0 to 299"),
        (np.zeros((2, 2)), "prompts: found ndarray of float64"),
        ([USER, "hi"], "a chat message does not fit: found 'hi'"),
        ([{"role": "user", "content": None}], "a chat message does not fit"),
        ([{"role": "user", "content": b"hi"}], "a chat message does not fit"),
        ([{"role": "user", "content": 5}], "a chat message does not fit"),
        ([{"role": None, "content": "hi"}], "a chat message does not fit"),
        (["\ud83d"], r"the prompt: found half of a surrogate pair \(U\+D83D\) as character 0"),
        ([[{"role": "user", "content": "a\udc80"}]], r"the prompt: found half of a surrogate pair \(U\+DC80\) as character 1"),
    ],
)  # fmt: skip
def test_what_is_no_prompt(engine: Engine, prompts: Any, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        engine.generate(prompts, GREEDY)


@pytest.mark.parametrize(
    "prompt", [None, b"hi", 5, {"hi"}, {"a": 1}, iter("hi"), ["hi"], "\udfff"], ids=lambda value: type(value).__name__
)
def test_what_is_no_prompt_of_a_stream(engine: Engine, prompt: Any) -> None:
    uses: list[Callable[[], Any]] = [
        lambda: engine.stream(prompt),
        lambda: engine.resolve(prompt),
        lambda: engine.encode(prompt),
    ]
    uses += [lambda: engine.astream(prompt), lambda: engine.encode(prompt, raw=True)]
    for use in uses:
        with pytest.raises(EngineError, match="the prompt: found "):
            use()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"params": {"temperature": 0}}, "params: found dict, expected SamplingParams"),
        ({"params": "greedy"}, r"params: found 'greedy' \(str\)"),
        ({"params": [None, GREEDY, 0]}, r"params\[2\]: found 0 \(int\), expected SamplingParams or None"),
        ({"params": SamplingParams}, "params: found type"),
        ({"params": (p for p in [GREEDY])}, "params: found generator"),
        ({"raw": "yes"}, r"raw: found 'yes' \(str\), expected True or False"),
        ({"raw": None}, r"raw: found None"),
        ({"parse_special": 1}, r"parse_special: found 1 \(int\), expected True or False"),
        ({"cache": "no-store"}, r"cache: found 'no-store' \(str\), expected CachePolicy or None"),
        ({"scheduling": {"priority": 1}}, "scheduling: found dict, expected Scheduling or None"),
    ],
)
def test_other_arguments(engine: Engine, options: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        engine.generate(["hi", "you", "all"], **options)
    with pytest.raises(EngineError, match=message):
        asyncio.run(engine.agenerate(["hi", "you", "all"], **options))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": "0"}, r"temperature: found '0' \(str\)"),
        ({"temperature": True}, r"temperature: found True \(bool\)"),
        ({"temperature": b"0"}, r"temperature: found b'0' \(bytes\)"),
        ({"temperature": 1j}, "temperature: found 1j"),
        ({"top_k": [5]}, r"top_k: found \[5\] \(list\)"),
        ({"seed": "1"}, "seed: found '1'"),
        ({"max_new_tokens": None, "n": None}, "n: found None"),
        ({"stop": None}, "stop: found None"),
        ({"stop": 5}, "stop: found 5"),
        ({"stop": b"x"}, "stop: found "),
        ({"stop": ["a", "\ud83d"]}, r"stop: found half of a surrogate pair \(U\+D83D\)"),
        ({"stop_token_ids": 5}, "stop_token_ids: found 5"),
        ({"stop_token_ids": ["5"]}, "stop_token_ids: found '5'"),
        ({"logit_bias": [(1, 2)]}, "logit_bias: found "),
        ({"logit_bias": {"1": 2}}, "logit_bias: found '1'"),
        ({"ignore_eos": 1}, "ignore_eos: found 1"),
        ({"n": 1.5}, "n: found 1.5"),
        ({"grammar": "a*"}, r"grammar: found 'a\*'"),
        ({"cache_salt": b"x"}, "cache_salt: found b'x'"),
        ({"logprobs": np.zeros(2)}, "logprobs: found array"),
    ],
)
def test_what_is_no_sampling_parameter(values: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        SamplingParams(**values)


def answers(results: list[Result]) -> list[list[int]]:
    return [result.token_ids for result in results]


def test_numbers_of_numpy_are_numbers(engine: Engine) -> None:
    plain = SamplingParams(0.5, 5, 0.5, 1.5, 7, 4, ignore_eos=True, stop_token_ids=(3,), logit_bias={4: 1.0})
    numpy = SamplingParams(
        np.float32(0.5), np.int64(5), np.float64(0.5), np.float16(1.5), np.uint8(7), np.int32(4),  # type: ignore[arg-type]
        ignore_eos=np.bool_(True), stop_token_ids=np.array([3]), logit_bias={np.int32(4): np.float32(1)},  # type: ignore[arg-type, dict-item]
    )  # fmt: skip
    expected = engine.resolve([5, 6], plain)
    for prompt in (np.array([5, 6]), np.array([5, 6], np.uint16), [np.int32(5), 6], (5, 6), range(5, 7)):
        request = engine.resolve(prompt, numpy)  # type: ignore[arg-type]
        assert request == expected and request.key(engine.identity) == expected.key(engine.identity)
        assert answers(engine.generate(prompt, numpy)) == answers(engine.generate([5, 6], plain))  # type: ignore[arg-type]
    both = engine.generate(np.array([[5, 6], [7, 8]]), plain)  # type: ignore[arg-type]
    assert answers(both) == answers(engine.generate([[5, 6], [7, 8]], plain))
    assert engine.encode(np.str_("hi"), raw=np.bool_(True)) == engine.encode("hi", raw=True)  # type: ignore[arg-type]
    assert (engine.logits(np.array([5, 6]), start=np.int64(1)) == engine.logits([5, 6], start=1)).all()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ("hi", {}, "token_ids: found 'hi'"),
        (None, {}, "token_ids: found None"),
        ({1, 2}, {}, "token_ids: found set"),
        ([[1, 2]], {}, "token_ids: found list in place 0"),
        ([1, 2], {"start": "0"}, r"start: found '0' \(str\), expected a whole number"),
        ([1, 2], {"start": 0.5}, "start: found 0.5"),
        ([1, 2], {"start": None}, "start: found None"),
    ],
)
def test_what_has_no_logits(engine: Engine, ids: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        engine.logits(ids, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"directory": None}, "engine: directory: found NoneType, expected a path"),
        ({"directory": b"/x"}, "engine: directory: found bytes"),
        ({"threads": "2"}, r"engine: threads: found '2' \(str\), expected a whole number"),
        ({"threads": 1.5}, r"engine: threads: found 1.5 \(float\)"),
        ({"threads": True}, "engine: threads: found True"),
        ({"isa": 5}, r"engine: isa: found 5 \(int\), expected str or None"),
        ({"result_cache": 5}, "engine: result_cache: found 5"),
        ({"max_num_seqs": "3"}, "max_num_seqs: found '3'"),
        ({"kv_tokens": "3"}, "is not an engine"),
    ],
)
def test_arguments_of_load(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        Engine.load(**{"directory": tmp_path, **options})


@pytest.mark.parametrize(
    "options",
    [{"max_bytes": "1"}, {"ttl_s": "1"}, {"audit": None}, {"timeout_s": True}],
    ids=lambda value: type(value).__name__,
)
def test_options_of_a_result_cache(options: dict[str, Any]) -> None:
    with pytest.raises(EngineError, match=f"result cache: {next(iter(options))}: found"):
        ResultCacheOptions(**options)
