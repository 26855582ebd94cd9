"""The time of a step: limits of memory and arithmetic, calls, sums."""

from __future__ import annotations

from dataclasses import replace

import pytest

from compiler.plan.predict import Rates, predict, sum_seconds
from compiler.plan.work import Product, RankWork
from runtime.program import KVLayout

RATES = Rates(read=100e9, integer=1e12, floating=1e11, call_s=1e-6, latency_s=10e-6, link=10e9)
LAYER, HEAD = Product(10**8, 2 * 10**8, True, True), Product(10**7, 2 * 10**7, True, False)
WORK = RankWork(0, 512, 11 * 10**7, 0, KVLayout(1, 8, 64, "float16"), (LAYER, HEAD), (4 * 8 * 64,), 20, (1000, 1000))


def test_one_token_reads_its_weights_once() -> None:
    step = predict(WORK, RATES, 1, sequences=1, tokens=1, context=16)
    kv = WORK.kv.block_bytes
    assert step.memory_s == pytest.approx((11e7 + kv) / 100e9)
    assert (step.arithmetic_s, step.calls_s, step.sums_s) == (0, pytest.approx(20e-6), 0)
    assert step.seconds == pytest.approx(step.memory_s + 20e-6)


def test_many_tokens_are_limited_by_arithmetic_but_for_the_head() -> None:
    step = predict(WORK, RATES, 1, sequences=2, tokens=256, context=128)
    assert step.arithmetic_s == pytest.approx(512 * 2e8 / 1e12 + 512 * 128 * 2048 / 1e11)
    assert step.memory_s == pytest.approx(1e7 / 100e9)


def test_a_longer_context_reads_more_keys_and_values() -> None:
    short, long = (predict(WORK, RATES, 1, sequences=4, tokens=1, context=context) for context in (160, 1600))
    assert long.memory_s - short.memory_s == pytest.approx(4 * 90 * WORK.kv.block_bytes / 100e9)


def test_sums_go_the_faster_way() -> None:
    assert sum_seconds(4000, RATES, 1) == 0
    assert sum_seconds(4000, RATES, 2) == pytest.approx(10e-6 + 4000 / 10e9)  # a message to each other
    assert sum_seconds(10**9, RATES, 4) == pytest.approx(6 * (10e-6 + 10**9 / 4 / 10e9))  # round a ring
    step = predict(WORK, RATES, 2, sequences=3, tokens=1, context=16)
    assert step.sums_s == pytest.approx(2 * (10e-6 + 12_000 / 10e9))
    assert predict(WORK, replace(RATES, latency_s=0), 2, sequences=3, tokens=1, context=16).seconds < step.seconds
