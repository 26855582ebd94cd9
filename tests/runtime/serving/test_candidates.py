"""The best logits of each rank against all of them: the same tokens, ties and penalties included."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.serving import candidates
from belle_compile.runtime.serving.request import SamplingParams
from belle_compile.runtime.serving.sampling import Sampler
from tests.runtime.fakes import make_request

VOCABULARY = 61


def spread(row: candidates.Row) -> np.ndarray:
    """All logits, -inf where they do not matter."""
    whole = np.full(VOCABULARY, -np.inf, np.float32)
    tokens, values = row if isinstance(row, candidates.Few) else (slice(None), row)
    whole[tokens] = values
    return whole


def gathered(
    logits: np.ndarray, wanted: list[int], spans: list[tuple[int, int]], few: bool = False
) -> tuple[list[candidates.Row], list[int]]:
    """Rank 0's rows, and the lengths of the ranks' messages."""
    messages, lengths = [], []
    for first, count in spans:
        message = np.full(candidates.message_size(len(logits), count), -9, np.int32)
        part: candidates.Rows = np.ascontiguousarray(logits[:, first : first + count])
        if few:  # as a GPU gives them: what matters, and some that do not
            part = [found_by_a_gpu(row, most) for row, most in zip(part, wanted, strict=True)]
        lengths.append(candidates.pack(part, count, np.array(wanted, np.int32), message))
        messages.append(message)
    return candidates.unpack(messages, spans, len(logits)), lengths


def found_by_a_gpu(row: np.ndarray, most: int) -> candidates.Row:
    if not 0 < most < len(row):
        return row
    tokens = np.flatnonzero(row >= np.sort(row)[-most] - 0.25)
    return candidates.Few(tokens, row[tokens])


def spans_of(ranks: int) -> list[tuple[int, int]]:
    ends = [VOCABULARY * rank // ranks for rank in range(ranks + 1)]
    return [(first, end - first) for first, end in pairwise(ends)]


@settings(deadline=None, max_examples=300)
@given(
    seed=st.integers(0, 2**32 - 1),
    levels=st.integers(1, 40),  # few give many ties
    ranks=st.integers(1, 5),
    few=st.booleans(),
    temperature=st.sampled_from([0.0, 0.7]),
    top_k=st.integers(0, 12),
    penalty=st.sampled_from([0.6, 1.0, 1.1, 2.0, 50.0]),
    prompt=st.lists(st.integers(0, VOCABULARY - 1), max_size=12),
    other=st.fixed_dictionaries(
        {
            "min_p": st.sampled_from([0.0, 0.3]),
            "presence_penalty": st.sampled_from([0.0, 0.0, 0.5, 2.0, -0.5]),
            "frequency_penalty": st.sampled_from([0.0, 0.0, 0.5, 1.5, -0.5]),
            "min_tokens": st.integers(0, 4),
            "logit_bias": st.dictionaries(st.integers(0, VOCABULARY - 1), st.sampled_from([-100, -1, -0.25]), max_size=5)
            | st.sampled_from([{7: 1.5, 9: -1}, dict.fromkeys(range(40), -9)]),
            "stop_token_ids": st.lists(st.integers(0, VOCABULARY - 1), max_size=3) | st.just(range(40)),
        }
    ),
)
def test_a_sampler_cannot_tell(
    seed: int,
    levels: int,
    ranks: int,
    few: bool,
    temperature: float,
    top_k: int,
    penalty: float,
    prompt: list[int],
    other: dict[str, Any],
) -> None:
    random = np.random.default_rng(seed)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=0.9, repetition_penalty=penalty, seed=1, **other)
    one, several = (Sampler(make_request(prompt, params, eos=(5,))) for _ in range(2))
    for _ in range(5):  # tokens that were chosen count as seen
        logits = (random.integers(-levels, levels + 1, (1, VOCABULARY)) / 4).astype(np.float32)
        rows, _ = gathered(logits, [several.candidates()], spans_of(ranks), few)
        if temperature:
            row = rows[0]
            copy = candidates.Few(row.tokens, row.values.copy()) if isinstance(row, candidates.Few) else row.copy()
            (ids, weights), (found_ids, found) = one.distribution(logits[0].copy()), several.distribution(copy)
            everything = np.arange(VOCABULARY)
            for a, b in ((ids, found_ids), (found_ids, ids)):
                np.testing.assert_array_equal(everything if a is None else a, everything if b is None else b)
            np.testing.assert_array_equal(weights, found)
        assert several.sample(rows[0]) == one.sample(logits[0])


def test_only_candidates_are_sent() -> None:
    logits = np.arange(2 * VOCABULARY, dtype=np.float32).reshape(2, -1)
    rows, lengths = gathered(logits, [3, 0], spans_of(2))
    np.testing.assert_array_equal(rows[1], logits[1])
    assert isinstance(rows[0], candidates.Few) and rows[0].tokens.tolist() == [27, 28, 29, 58, 59, 60]
    np.testing.assert_array_equal(rows[0].values, logits[0, rows[0].tokens])
    exact, _ = gathered(logits, [3, 0], spans_of(2), few=True)
    np.testing.assert_array_equal(spread(exact[0]), spread(rows[0]))
    assert lengths == [1 + 6 + 1 + 30, 1 + 6 + 1 + 31]


@pytest.mark.parametrize("wanted", [31, 40, 61, 100])
def test_many_candidates_are_sent_as_all(wanted: int) -> None:
    logits = np.random.default_rng(0).normal(size=(1, VOCABULARY)).astype(np.float32)
    rows, _ = gathered(logits, [wanted], [(0, VOCABULARY)])
    np.testing.assert_array_equal(rows[0], logits[0])


def test_equal_logits_are_sent_as_all() -> None:
    logits = np.zeros((1, VOCABULARY), np.float32)
    np.testing.assert_array_equal(gathered(logits, [1], spans_of(3))[0][0], logits[0])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_found(value: float) -> None:
    logits = np.zeros((1, VOCABULARY), np.float32)
    logits[0, 3:8], logits[0, 40] = (1, 1, 1, 1, value), value
    sampler = Sampler(make_request([], SamplingParams(temperature=0)))
    rows, _ = gathered(logits, [sampler.candidates()], spans_of(2))
    np.testing.assert_array_equal(rows[0], logits[0])
    with pytest.raises(EngineError, match=f"not finite: found {value}"):
        sampler.sample(rows[0])


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"temperature": 0}, 1),
        ({"temperature": 0, "repetition_penalty": 1.2}, 1 + 3),
        ({"temperature": 0, "repetition_penalty": 0.9}, 0),
        ({"temperature": 1, "top_k": 40}, 40),
        ({"temperature": 1, "top_k": 40, "repetition_penalty": 1.2}, 40 + 3),
        ({"temperature": 1, "top_k": 0}, 0),
        ({"temperature": 1, "top_k": 0, "min_p": 0.5}, 0),
        ({"temperature": 1, "top_k": 40, "min_p": 0.5}, 40),
        ({"temperature": 0, "presence_penalty": 1}, 1),
        ({"temperature": 0, "frequency_penalty": 1, "repetition_penalty": 1.2}, 1 + 3),
        ({"temperature": 0, "frequency_penalty": -1}, 0),
        ({"temperature": 0, "presence_penalty": -1, "frequency_penalty": 1}, 0),
        ({"temperature": 0, "logit_bias": {1: -1, 2: -5, 3: 0}}, 1 + 2),
        ({"temperature": 0, "logit_bias": {1: -1, 2: 0.5}}, 0),
        ({"temperature": 0, "min_tokens": 2}, 1 + 1),
        ({"temperature": 0, "min_tokens": 2, "stop_token_ids": (8, 9)}, 1 + 3),
        ({"temperature": 0, "min_tokens": 2, "ignore_eos": True}, 1),
        ({"temperature": 0, "logprobs": 0}, 0),
        ({"temperature": 0, "prompt_logprobs": 3}, 1),
    ],
)
def test_how_many_candidates_a_sampler_wants(params: dict[str, Any], expected: int) -> None:
    sampler = Sampler(make_request([5, 6, 6, 7], SamplingParams(**params), eos=(2,)))
    assert sampler.candidates() == expected
    counting = ("repetition_penalty", 1), ("presence_penalty", 0), ("frequency_penalty", 0)
    counts = any(params.get(name, off) > off for name, off in counting)
    assert sampler.candidates(2) == expected + (2 if counts and expected else 0)


def test_min_tokens_ask_for_nothing_once_they_are_there() -> None:
    sampler = Sampler(make_request([], SamplingParams(temperature=0, min_tokens=1, frequency_penalty=1), eos=(2,)))
    assert sampler.candidates() == 1 + 1
    sampler.sample(np.array([0, 1, 2], np.float32))
    assert sampler.candidates() == 1 + 1  # the end may come, and one token is penalised
