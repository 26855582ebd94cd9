"""The time of a step: limits of memory and arithmetic, calls, sums."""

from __future__ import annotations

from dataclasses import replace
from math import hypot

import pytest

from belle_compile.compiler.backends.base import KVCache
from belle_compile.compiler.plan.predict import Rates, predict, sum_seconds
from belle_compile.compiler.plan.work import AttentionWork, Product, RankWork
from belle_compile.runtime.program import KVLayout

RATES = Rates(read=100e9, several=0.5, integer=1e12, floating=1e11, call_s=1e-6, latency_s=10e-6, link=10e9)
LAYER, HEAD = Product(10**8, 2 * 10**8, True, True), Product(10**7, 2 * 10**7, True, False)
KV = KVCache("float16", KVLayout(1, 8, 64, "float16").block_bytes, 16, 4096)
WORK = RankWork(512, KV, (LAYER, HEAD), (AttentionWork(4 * 8 * 64, 0),), 20, (1000, 1000))


def test_one_token_reads_its_weights_once() -> None:
    step = predict(WORK, RATES, 1, sequences=1, tokens=1, context=16)
    kv = WORK.kv.block_bytes
    weights = hypot(11e7 / 100e9, 2 * 11e7 / 1e12)  # each product's reading and computing, in part at once
    assert step.memory_s == pytest.approx(weights + hypot(kv / 100e9, 16 * 2048 / 1e11))
    assert (step.arithmetic_s, step.calls_s, step.sums_s) == (0, pytest.approx(20e-6), 0)
    assert step.seconds == pytest.approx(step.memory_s + 20e-6)


def test_many_tokens_are_limited_by_arithmetic_but_for_the_head() -> None:
    step = predict(WORK, RATES, 1, sequences=2, tokens=256, context=128)
    layer = hypot(512 * 2e8 / 1e12, 1e8 / (0.5 * 100e9))
    attention = hypot(512 * 128 * 2048 / 1e11, 2 * 8 * WORK.kv.block_bytes / 100e9)
    assert step.arithmetic_s == pytest.approx(layer + attention)
    head = hypot(1e7 / (0.5 ** (1 / 3) * 100e9), 2 * 2e7 / 1e12)  # of two rows
    assert step.memory_s == pytest.approx(head)


def test_weights_are_read_slower_for_several_rows_up_to_eight() -> None:
    rates = replace(RATES, integer=1e20, floating=1e20)
    one, two, eight, many = (predict(WORK, rates, 1, sequences=count, tokens=1, context=0).memory_s for count in (1, 2, 8, 64))
    assert (two, eight, many) == (pytest.approx(one * 2 ** (1 / 3)), pytest.approx(2 * one), pytest.approx(2 * one))


def test_a_longer_context_reads_more_keys_and_values() -> None:
    short, long = (predict(WORK, RATES, 1, sequences=4, tokens=1, context=context) for context in (160, 1600))
    more = hypot(4 * 90 * WORK.kv.block_bytes / 100e9, 4 * 1440 * 2048 / 1e11)
    assert long.memory_s - short.memory_s == pytest.approx(more)
    windowed = replace(WORK, attention=(AttentionWork(WORK.attention[0].operations, 160),))
    assert predict(windowed, RATES, 1, sequences=4, tokens=1, context=1600) == short


def test_sums_go_the_faster_way() -> None:
    assert sum_seconds(4000, RATES, 1) == 0
    assert sum_seconds(4000, RATES, 2) == pytest.approx(10e-6 + 4000 / 10e9)  # a message to each other
    assert sum_seconds(10**9, RATES, 4) == pytest.approx(6 * (10e-6 + 10**9 / 4 / 10e9))  # round a ring
    step = predict(WORK, RATES, 2, sequences=3, tokens=1, context=16)
    assert step.sums_s == pytest.approx(2 * (10e-6 + 12_000 / 10e9))
    assert predict(WORK, replace(RATES, latency_s=0), 2, sequences=3, tokens=1, context=16).seconds < step.seconds
