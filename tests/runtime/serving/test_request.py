"""Requests: where their values come from, and that their key tells apart whatever may have another answer."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from belle_compile.runtime.artifact import GenerationDefaults
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.serving.grammar.source import Grammar
from belle_compile.runtime.serving.request import (
    KEY_VERSION,
    NOT_IN_KEY,
    EngineIdentity,
    Limits,
    Request,
    RequestDefaults,
    SamplingParams,
    encode,
)
from tests.runtime.fakes import NOTHING_ELSE, make_request

WORD = Grammar("regex", "[a-z]+")
ENGINE = EngineIdentity("ab" * 32, "0.1.0", "avx2", 1)
REQUEST = make_request([1, 2, 3], SamplingParams(temperature=0.5, seed=7, stop=("x",), prompt_lookup=2), eos=(2,))


def test_defaults_of_the_engine_fill_what_is_not_set() -> None:
    defaults = GenerationDefaults(200, 0.35, 30, 0.85, 1.2)
    request = make_request([5, 6], SamplingParams(top_k=5, seed=3), defaults=defaults, eos=(2, 9))
    assert request == Request((5, 6), 200, 0.35, 5, 0.85, 1.2, 3, (), (2, 9), 0, *NOTHING_ELSE)
    every = SamplingParams(
        0.1, 2, 0.3, 1.4, 5, 6, ("end",), True, 7, 0.05, 1, -1, {9: 2, 4: -3, 7: 0}, 3, (8, 6, 8), 2, 0, 3, "a", WORD
    )
    assert make_request([1], every, defaults=defaults, eos=(2,)) == Request(
        (1,), 6, 0.1, 2, 0.3, 1.4, 5, ("end",), (), 7, 0.05, 1.0, -1.0, ((4, -3.0), (9, 2.0)), 3, (6, 8), 2, 0, 0, "a", WORD, ""
    )


def test_defaults_that_are_usually_off() -> None:
    defaults = GenerationDefaults(200, min_p=0.1, min_tokens=3, stop=("x", "y"))
    params = SamplingParams()
    request = make_request([1], params, defaults=defaults)
    off = make_request([1], SamplingParams(min_p=0, min_tokens=0, ignore_eos=True), defaults=defaults)
    assert (request.min_p, request.min_tokens, request.stop) == (0.1, 3, ("x", "y"))
    assert (off.min_p, off.min_tokens, off.stop) == (0, 0, ())
    assert make_request([1], SamplingParams(stop=("z", "x")), defaults=defaults).stop == ("z", "x", "y")
    assert make_request([1], SamplingParams(max_new_tokens=2), defaults=defaults).min_tokens == 2, "a default gives way"
    changes: list[dict[str, Any]] = [{}, {"min_p": 0.2}, {"min_tokens": 4}, {"stop": ("x",)}]
    each = [make_request([1], params, defaults=dataclasses.replace(defaults, **change)) for change in changes]
    assert len({request.key(ENGINE) for request in each}) == 4, "what the defaults resolve to is in the key"


def test_values_that_mean_off_are_kept() -> None:
    defaults = GenerationDefaults(200, 0.35, 30, 0.85, 1.2)
    off = SamplingParams(temperature=0, top_k=0, top_p=1, repetition_penalty=1)
    request = make_request([1], off, defaults=defaults)
    assert (request.temperature, request.top_k, request.top_p, request.repetition_penalty) == (0, 0, 1, 1)


def test_every_parameter_reaches_the_request() -> None:
    renamed = {"ignore_eos": "eos_ids", "n": "answer"}
    parameters = {renamed.get(field.name, field.name) for field in dataclasses.fields(SamplingParams)}
    assert parameters | {"prompt"} == {field.name for field in dataclasses.fields(Request)}


def test_length_is_cut_by_default_and_refused_when_asked_for() -> None:
    limits = Limits(max_context=32, cache_tokens=64)
    defaults = RequestDefaults(GenerationDefaults(max_new_tokens=12), (2,), limits, 300)
    assert Request.resolve([1] * 10, SamplingParams(), defaults).max_new_tokens == 12
    assert Request.resolve([1] * 30, SamplingParams(), defaults).max_new_tokens == 2
    with pytest.raises(EngineError, match="prompt and max_new_tokens are too long: found 40 tokens, expected at most 32"):
        Request.resolve([1] * 30, SamplingParams(max_new_tokens=10), defaults)
    with pytest.raises(EngineError, match=r"the prompt and one token are too long: found 33 tokens.*longest context"):
        Request.resolve([1] * 32, SamplingParams(), defaults)


def test_numbers_of_numpy_and_json_become_plain_ones() -> None:
    odd = SamplingParams(temperature=1, top_k=40.0, seed=np.int64(5), top_p=np.float64(0.5), max_new_tokens=np.int32(3))  # type: ignore[arg-type]
    plain = SamplingParams(temperature=1.0, top_k=40, seed=5, top_p=0.5, max_new_tokens=3)
    assert make_request([1], odd).key(ENGINE) == make_request([1], plain).key(ENGINE)
    assert {type(value) for value in vars(make_request([1], odd)).values()} == {tuple, int, float, str, type(None)}


def test_requests_are_frozen_and_hashable() -> None:
    same = make_request([1, 2, 3], SamplingParams(temperature=0.5, seed=7, stop=["x"], prompt_lookup=2), eos=(2,))  # type: ignore[arg-type]
    assert same == REQUEST and hash(same) == hash(REQUEST) and len({same, REQUEST}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        same.top_k = 3  # type: ignore[misc]


OTHER: dict[str, Any] = {
    "prompt": (1, 2), "max_new_tokens": 3, "temperature": 0.25, "top_k": 9, "top_p": 0.5, "repetition_penalty": 1.5,
    "seed": None, "stop": ("x", "y"), "eos_ids": (3,), "prompt_lookup": 5, "min_p": 0.1, "presence_penalty": 0.5,
    "frequency_penalty": 0.5, "logit_bias": ((1, 2.0),), "min_tokens": 1, "stop_token_ids": (2,), "logprobs": 0,
    "prompt_logprobs": 0, "answer": 1, "cache_salt": "a", "grammar": WORD, "adapter": "ab" * 32,
}  # fmt: skip


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Request)])
def test_every_field_is_in_the_key_or_excluded_by_name(name: str) -> None:
    changed = dataclasses.replace(REQUEST, **{name: OTHER[name]})
    assert (changed.key(ENGINE) == REQUEST.key(ENGINE)) == (name in NOT_IN_KEY)


def test_exclusions_are_fields() -> None:
    assert {field.name for field in dataclasses.fields(Request)} > NOT_IN_KEY == {"prompt_lookup"}


def test_a_new_field_is_in_the_key() -> None:
    @dataclasses.dataclass(frozen=True)
    class WithTools(Request):
        tools: int | None = None

    keys = {WithTools(**vars(REQUEST), tools=value).key(ENGINE) for value in (None, 0, 1)}
    assert len(keys | {REQUEST.key(ENGINE)}) == 4

    @dataclasses.dataclass(frozen=True)
    class WithFraction(Request):
        share: Fraction = Fraction(1, 2)

    with pytest.raises(TypeError, match=r"a Fraction in a request's key: encode\(\) needs a tag for this type"):
        WithFraction(**vars(REQUEST)).key(ENGINE)


@pytest.mark.parametrize(
    ("name", "value"), [("digest", "cd" * 32), ("runtime_version", "0.1.1"), ("kernels", "amx"), ("ranks", 2)]
)
def test_every_part_of_the_engine_is_in_the_key(name: str, value: Any) -> None:
    assert REQUEST.key(dataclasses.replace(ENGINE, **{name: value})) != REQUEST.key(ENGINE)


def test_the_key_of_a_version_never_changes() -> None:
    """Whoever changes what is digested, a new field included, raises KEY_VERSION: results may be stored under old keys."""
    assert KEY_VERSION == 4
    assert REQUEST.key(ENGINE) == "ee80ef2b398d55c7a6b44b713c4d4ed34b25d8eb380b4bf6774a3ab7557e072b"


CONFUSING = [
    None, True, False, 0, 1, -1, 1.0, 0.0, "", "1", "True", "None", "n", "i1;", (), (1,), ("1",), (True,), (1.0,), ((1,),),
    ((), ()), ((),), (1, 2), (2, 1), (12,), ((1, 2),), ((1,), 2), (1, (2,)), ("a", "b"), ("ab",), ("a", "b", ""), ("s1:a",),
    math.inf, math.nan, "你", "\ud800", WORD, ("regex", "[a-z]+"),
]  # fmt: skip


def test_values_that_are_easily_confused_are_encoded_apart() -> None:
    for one, other in combinations(CONFUSING, 2):
        assert encode(one) != encode(other), (one, other)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4).map(tuple),
    max_leaves=12,
)


@given(one=VALUES, other=VALUES)
def test_equal_bytes_mean_equal_values(one: Any, other: Any) -> None:
    assert (encode(one) == encode(other)) == (repr(one) == repr(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"stop": ("a", "b")}, {"stop": ("b", "a")}),
        ({"stop": ("ab",)}, {"stop": ("a", "b")}),
        ({"stop": ("1",)}, {"stop": (1,)}),
        ({"prompt": (1, 23)}, {"prompt": (12, 3)}),
        ({"prompt": (1,)}, {"prompt": (True,)}),
        ({"top_k": 1}, {"top_k": True}),
        ({"top_k": 1}, {"top_k": 1.0}),
        ({"seed": 1}, {"seed": "1"}),
        ({"seed": None}, {"seed": "None"}),
        ({"prompt": (1, 2), "eos_ids": ()}, {"prompt": (), "eos_ids": (1, 2)}),
        ({"max_new_tokens": 3, "top_k": 4}, {"max_new_tokens": 4, "top_k": 3}),
    ],
)
def test_order_and_types_are_in_the_key(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert dataclasses.replace(REQUEST, **one).key(ENGINE) != dataclasses.replace(REQUEST, **other).key(ENGINE)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -0.1}, r"sampling: temperature: found -0\.1, expected 0 or more"),
        ({"temperature": float("nan")}, "temperature: found nan"),
        ({"temperature": "1"}, r"temperature: found '1' \(str\), expected 0 or more"),
        ({"temperature": True}, r"temperature: found True \(bool\)"),
        ({"top_k": -1}, r"top_k: found -1, expected 0 \(off\) or more"),
        ({"top_k": 2.5}, r"top_k: found 2\.5, expected a whole number, 0 \(off\) or more"),
        ({"top_k": float("inf")}, "top_k: found inf"),
        ({"top_p": 0.0}, r"top_p: found 0\.0, expected above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: found 0.0, expected above 0"),
        ({"max_new_tokens": 0}, "max_new_tokens: found 0, expected 1 or more"),
        ({"seed": -1}, "seed: found -1"),
        ({"seed": 2**64}, "seed: found 18446744073709551616, expected 0 or more, below 2 to the power of 64"),
        ({"seed": 10**5000}, "seed: found a number of thousands of digits, expected a whole number, 0 or more"),
        ({"temperature": 10**400}, r"temperature: found 1000.*\.\.\., expected 0 or more"),
        ({"seed": [1]}, r"seed: found \[1\] \(list\)"),
        ({"stop": ("a", "")}, "stop: found an empty string; leave it out"),
        ({"stop": (None,)}, "stop: found None, expected text"),
        ({"stop": 5}, "stop: found 5, expected text"),
        ({"stop": ["x"] * 65}, "stop: found more than 64 strings, expected at most 64"),
        ({"stop": "x" * 1025}, "stop: found a string of 1025 characters, expected at most 1024"),
        ({"ignore_eos": "no"}, r"ignore_eos: found 'no' \(str\), expected True or False"),
        ({"prompt_lookup": None}, r"prompt_lookup: found None \(NoneType\), expected a whole number"),
        ({"min_p": 1.01}, r"min_p: found 1\.01, expected 0 \(off\) to 1"),
        ({"min_p": float("nan")}, "min_p: found nan"),
        ({"presence_penalty": 2.1}, r"presence_penalty: found 2\.1, expected -2 to 2"),
        ({"frequency_penalty": -2.1}, r"frequency_penalty: found -2\.1, expected -2 to 2"),
        ({"frequency_penalty": "a" * 10**6}, r"frequency_penalty: found 'aaa.{70,80}\.\.\. \(str\), expected -2 to 2"),
        ({"logit_bias": {1: 101}}, "logit_bias: found 101, expected biases from -100 to 100"),
        ({"logit_bias": {1: float("nan")}}, "logit_bias: found nan"),
        ({"logit_bias": {-1: 1}}, "logit_bias: found -1, expected token ids, 0 or more"),
        ({"logit_bias": {"5": 1}}, r"logit_bias: found '5' \(str\), expected a whole number, token ids"),
        ({"logit_bias": {None: 1}}, r"logit_bias: found None \(NoneType\)"),
        ({"logit_bias": dict.fromkeys(range(1025), 1)}, "logit_bias: found more than 1024 entries, expected at most 1024"),
        ({"logit_bias": [5]}, r"logit_bias: found \[5\] \(list\), expected a mapping of token ids to numbers"),
        ({"logit_bias": (5,)}, r"logit_bias: found 5, expected pairs of a token id and a number"),
        ({"logit_bias": ((5, 1), (5, 2))}, "logit_bias: found a token id twice, expected each token id once"),
        ({"min_tokens": -1}, "min_tokens: found -1"),
        ({"stop_token_ids": 5}, "stop_token_ids: found 5, expected several token ids"),
        ({"stop_token_ids": "56"}, r"stop_token_ids: found '56' \(str\), expected several token ids"),
        ({"stop_token_ids": [5, -1]}, "stop_token_ids: found -1, expected token ids, 0 or more"),
        ({"stop_token_ids": [None]}, r"stop_token_ids: found None \(NoneType\)"),
        ({"stop_token_ids": range(10**9)}, "stop_token_ids: found more than 64 token ids, expected at most 64"),
        ({"logprobs": 21}, "logprobs: found 21, expected 0 to 20 alternatives"),
        ({"logprobs": True}, r"logprobs: found True \(bool\)"),
        ({"prompt_logprobs": -1}, "prompt_logprobs: found -1, expected 0 to 20 alternatives"),
        ({"n": 0}, "n: found 0, expected 1 to 128 answers"),
        ({"n": 10_000}, "n: found 10000, expected 1 to 128 answers"),
        ({"n": None}, r"n: found None \(NoneType\)"),
        ({"cache_salt": None}, r"cache_salt: found None \(NoneType\), expected text of at most 1024 characters"),
        ({"cache_salt": "a" * 1025}, r"cache_salt: found 'aaa.{70,80}\.\.\. \(str\), expected text of at most 1024 characters"),
    ],
)
def test_impossible_values(fields: dict[str, object], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        SamplingParams(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"logit_bias": {5: 1, 300: 1}}, "logit_bias: found 300, expected token ids of the vocabulary, 0 to 299"),
        ({"stop_token_ids": [300]}, "stop_token_ids: found 300, expected token ids of the vocabulary, 0 to 299"),
        ({"min_tokens": 5, "max_new_tokens": 4}, "min_tokens: found 5, expected at most 4, the longest answer"),
    ],
)
def test_values_that_do_not_fit_the_engine(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        make_request([1], SamplingParams(**fields), vocab_size=300)


def test_a_top_k_of_the_whole_vocabulary_is_off() -> None:
    """An executor's candidates are int32 numbers, and no request may have one that is larger."""
    sizes = [make_request([1], SamplingParams(top_k=k), vocab_size=300).top_k for k in (299, 300, 10**12)]
    assert sizes == [299, 0, 0]


def test_equal_biases_and_stop_ids_have_equal_keys() -> None:
    keys = {
        make_request([1], SamplingParams(logit_bias=biases, stop_token_ids=ids)).key(ENGINE)  # type: ignore[arg-type]
        for biases, ids in (({1: 2, 3: -1}, [4, 5]), ({3: -1.0, 1: 2.0, 8: 0}, (5, 4, 4)), (((3, -1), (1, 2)), {4, 5}))
    }
    assert len(keys) == 1
    params = SamplingParams(logit_bias={3: 1, 1: 2}, stop_token_ids=[5, 4])  # type: ignore[arg-type]
    assert (params.logit_bias, params.stop_token_ids) == (((1, 2.0), (3, 1.0)), (4, 5)) and hash(params)


def test_answers_of_a_prompt() -> None:
    assert [request.answer for request in REQUEST.answers(3)] == [0, 1, 2]
    assert REQUEST.answers(3)[0] is REQUEST and len({request.key(ENGINE) for request in REQUEST.answers(3)}) == 3
    greedy = make_request([1], SamplingParams(temperature=0, seed=7))
    assert greedy.greedy and not REQUEST.greedy and greedy.answers(3) == [greedy] * 3


def test_one_stop_string_may_come_bare() -> None:
    assert SamplingParams(stop="END").stop == ("END",)  # type: ignore[arg-type]
