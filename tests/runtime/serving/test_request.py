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
from tests.runtime.fakes import make_request

ENGINE = EngineIdentity("ab" * 32, "0.1.0", "avx2", 1)
REQUEST = make_request([1, 2, 3], SamplingParams(temperature=0.5, seed=7, stop=("x",), prompt_lookup=2), eos=(2,))


def test_defaults_of_the_engine_fill_what_is_not_set() -> None:
    defaults = GenerationDefaults(200, 0.35, 30, 0.85, 1.2)
    request = make_request([5, 6], SamplingParams(top_k=5, seed=3), defaults=defaults, eos=(2, 9))
    assert request == Request((5, 6), 200, 0.35, 5, 0.85, 1.2, 3, (), (2, 9), 0)
    every = SamplingParams(0.1, 2, 0.3, 1.4, 5, 6, ("end",), True, 7)
    assert make_request([1], every, defaults=defaults, eos=(2,)) == Request((1,), 6, 0.1, 2, 0.3, 1.4, 5, ("end",), (), 7)


def test_values_that_mean_off_are_kept() -> None:
    defaults = GenerationDefaults(200, 0.35, 30, 0.85, 1.2)
    off = SamplingParams(temperature=0, top_k=0, top_p=1, repetition_penalty=1)
    request = make_request([1], off, defaults=defaults)
    assert (request.temperature, request.top_k, request.top_p, request.repetition_penalty) == (0, 0, 1, 1)


def test_every_parameter_reaches_the_request() -> None:
    renamed = {"ignore_eos": "eos_ids"}
    parameters = {renamed.get(field.name, field.name) for field in dataclasses.fields(SamplingParams)}
    assert parameters | {"prompt"} == {field.name for field in dataclasses.fields(Request)}


def test_length_is_cut_by_default_and_refused_when_asked_for() -> None:
    limits = Limits(max_context=32, cache_tokens=64)
    defaults = RequestDefaults(GenerationDefaults(max_new_tokens=12), (2,), limits)
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
    assert {type(value) for value in vars(make_request([1], odd)).values()} == {tuple, int, float}


def test_requests_are_frozen_and_hashable() -> None:
    same = make_request([1, 2, 3], SamplingParams(temperature=0.5, seed=7, stop=["x"], prompt_lookup=2), eos=(2,))  # type: ignore[arg-type]
    assert same == REQUEST and hash(same) == hash(REQUEST) and len({same, REQUEST}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        same.top_k = 3  # type: ignore[misc]


OTHER: dict[str, Any] = {
    "prompt": (1, 2), "max_new_tokens": 3, "temperature": 0.25, "top_k": 9, "top_p": 0.5, "repetition_penalty": 1.5,
    "seed": None, "stop": ("x", "y"), "eos_ids": (3,), "prompt_lookup": 5,
}  # fmt: skip


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Request)])
def test_every_field_is_in_the_key_or_excluded_by_name(name: str) -> None:
    changed = dataclasses.replace(REQUEST, **{name: OTHER[name]})
    assert (changed.key(ENGINE) == REQUEST.key(ENGINE)) == (name in NOT_IN_KEY)


def test_exclusions_are_fields() -> None:
    assert {field.name for field in dataclasses.fields(Request)} > NOT_IN_KEY == {"prompt_lookup"}


def test_a_new_field_is_in_the_key() -> None:
    @dataclasses.dataclass(frozen=True)
    class WithLogprobs(Request):
        logprobs: int | None = None

    keys = {WithLogprobs(**vars(REQUEST), logprobs=value).key(ENGINE) for value in (None, 0, 1)}
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
    assert KEY_VERSION == 1
    assert REQUEST.key(ENGINE) == "92b7f951649f1a13747071023429921a975029e49eec6edca3dd4bdcfc69f20c"


CONFUSING = [
    None, True, False, 0, 1, -1, 1.0, 0.0, "", "1", "True", "None", "n", "i1;", (), (1,), ("1",), (True,), (1.0,), ((1,),),
    ((), ()), ((),), (1, 2), (2, 1), (12,), ((1, 2),), ((1,), 2), (1, (2,)), ("a", "b"), ("ab",), ("a", "b", ""), ("s1:a",),
    math.inf, math.nan, "你", "\ud800",
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
        ({"seed": [1]}, r"seed: found \[1\] \(list\)"),
        ({"stop": ("a", "")}, "a stop string is empty"),
        ({"stop": (None,)}, "a stop string: found None, expected text"),
        ({"stop": 5}, "a stop string: found 5, expected text"),
    ],
)
def test_impossible_values(fields: dict[str, object], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        SamplingParams(**fields)  # type: ignore[arg-type]


def test_one_stop_string_may_come_bare() -> None:
    assert SamplingParams(stop="END").stop == ("END",)  # type: ignore[arg-type]
