"""Entries: what is read is what was written for this key, and nothing else is read at all."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from belle_compile.runtime.engine import Result
from belle_compile.runtime.serving.logprobs import TokenLogprob
from belle_compile.runtime.serving.request import MAX_LOGPROBS, SamplingParams
from belle_compile.runtime.serving.result_cache.entry import DERIVED, STORED, DamagedEntry, Entry
from tests.runtime.fakes import make_request

KEY = "ab" * 32
SCORES = tuple(TokenLogprob(token, -0.5, ((7, -0.25), (8, -3.0))) for token in (5, 6, 250_879))
ENTRY = Entry((5, 6, 250_879), "stop", SCORES, (None, TokenLogprob(4, -1.5)))


IDS, VALUES = st.integers(0, 2**31 - 1), st.floats(width=32, allow_nan=False)
SCORED = st.builds(TokenLogprob, IDS, VALUES, st.lists(st.tuples(IDS, VALUES), max_size=5).map(tuple))


@given(
    st.lists(IDS).map(tuple),
    st.sampled_from(["stop", "length"]),
    st.none() | st.lists(SCORED, max_size=6).map(tuple),
    st.none() | st.lists(st.none() | SCORED, max_size=6).map(tuple),
)
def test_entries_are_read_as_they_were_written(tokens: Any, reason: Any, logprobs: Any, prompt_logprobs: Any) -> None:
    entry = Entry(tokens, reason, logprobs, prompt_logprobs)
    assert repr(Entry.decode(KEY, entry.encode(KEY))) == repr(entry), "the sign of a zero included"


def test_no_changed_byte_goes_unnoticed() -> None:
    data = ENTRY.encode(KEY)
    for index in range(len(data)):
        with pytest.raises(DamagedEntry):
            Entry.decode(KEY, data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :])
    for other in (b"", data[:-1], data[:-4], data + b"\0", data[:20]):
        with pytest.raises(DamagedEntry):
            Entry.decode(KEY, other)


def test_the_most_likely_tokens_can_be_counted_in_a_byte() -> None:
    assert MAX_LOGPROBS < 255


def test_an_entry_in_the_place_of_another_is_noticed() -> None:
    with pytest.raises(DamagedEntry):
        Entry.decode("cd" * 32, ENTRY.encode(KEY))


@pytest.mark.parametrize(
    ("tokens", "reason", "fits"),
    [
        ((5, 6, 2), "stop", True),
        ((2,), "stop", True),
        ((5, 6, 7, 8), "length", True),
        ((5, 6), "length", False),
        ((5, 6), "stop", False),
        ((5, 2, 6, 7), "length", False),
        ((5, 6, 7, 2), "length", False),
        ((5, 6, 7, 8, 9), "length", False),
        ((), "stop", False),
    ],
)
def test_an_answer_that_ends_elsewhere_than_the_request_does_not_fit(tokens: tuple[int, ...], reason: str, fits: bool) -> None:
    request = make_request([1], SamplingParams(temperature=0, max_new_tokens=4), eos=(2,))
    assert Entry(tokens, reason).fits(request) is fits  # type: ignore[arg-type]


def test_where_every_field_of_a_result_comes_from_is_decided() -> None:
    assert {field.name for field in dataclasses.fields(Result)} == STORED | DERIVED
    assert {field.name for field in dataclasses.fields(Entry)} == STORED
