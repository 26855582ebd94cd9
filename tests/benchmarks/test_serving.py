"""What the measurements of the caches compare with: ideal hits, distinct tokens, traces, and requests that repeat."""

from __future__ import annotations

import dataclasses

from belle_compile.runtime import SamplingParams
from benchmarks.invariance.requests import cases
from benchmarks.prefix_cache import distinct_tokens
from benchmarks.result_cache import Sample, entry_bytes, ideal_hits, summarize, trace


def test_an_ideal_lru_evicts_the_entry_used_longest_ago() -> None:
    sizes = {0: 4, 1: 4, 2: 4, 3: 100}
    assert ideal_hits([0, 1, 0, 2, 0, 1, 2], sizes, 8) == [False, False, True, False, True, False, False]
    assert ideal_hits([3, 3], sizes, 8) == [False, False]


def test_an_entry_of_more_tokens_takes_more_bytes() -> None:
    assert entry_bytes(17) - entry_bytes(16) == 4


def test_traces_repeat_and_ask_the_first_question_most() -> None:
    numbers = trace(50, 2000, 1.0)
    assert numbers == trace(50, 2000, 1.0)
    assert set(numbers) <= set(range(50))
    assert numbers.count(0) > numbers.count(9) > 0


def test_a_summary_says_whether_the_hits_are_the_ideal_ones() -> None:
    samples = [Sample(0, False, 0.2, 3), Sample(0, True, 0.001, 3), Sample(0, True, 0.003, 3)]
    assert summarize(samples) | {"hit_p99_ms": 0} == {
        "hits": 2, "ideal_lru_hits": 2, "same_hits_as_ideal": True, "hit_ratio": 0.6667,
        "hit_p50_ms": 2.0, "hit_p99_ms": 0, "miss_p50_ms": 200.0,
    }  # fmt: skip
    assert not summarize([*samples, Sample(0, False, 0.2, 3)])["same_hits_as_ideal"]


def test_distinct_tokens_count_shared_beginnings_once() -> None:
    assert distinct_tokens([[1, 2, 3, 4], [1, 2, 3, 5], [1, 9, 3]]) == 3 + 1 + 3
    assert distinct_tokens([[7]]) == 1


def test_cases_repeat_and_use_every_field() -> None:
    calls = cases(["为什么天空是蓝色的？", "1+1=?"], 300, 16)
    assert calls == cases(["为什么天空是蓝色的？", "1+1=?"], 300, 16)
    unused = {
        field.name
        for field in dataclasses.fields(SamplingParams)
        if all(getattr(call.params, field.name) == getattr(SamplingParams(), field.name) for call in calls)
    }
    # The salt changes no answer, and an adapter needs an engine that was built for adapters.
    assert unused == {"adapter", "cache_salt"}
