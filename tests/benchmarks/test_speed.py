"""What a speed run counts: readings of memory lie among the decoding steps and are no part of their time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tvm")

from belle_compile.runtime.host import host_isas
from benchmarks import speed
from benchmarks.bandwidth import ReadBandwidth
from benchmarks.tasks import Task
from tests.runtime.fakes import FakeExecutor, make_engine

DECODE, PREFILL = Task("decode", 2, 3, steps=4), Task("prefill", 1, 6)
PAUSE_S = 0.02


class Memory:
    """Takes a while to read, always at the same rate."""

    def __init__(self) -> None:
        self.reads = 0

    def read(self) -> None:
        self.reads += 1
        time.sleep(PAUSE_S)

    def rate(self, seconds: Sequence[float]) -> float:
        assert len(seconds) == self.reads
        return 7.0


class Products:
    """Two rates: before a run and after it."""

    def __init__(self) -> None:
        self.rates = [4.0, 6.0]

    def measure(self, repeats: int) -> float:
        return self.rates.pop(0)


def test_memory_is_read_before_every_decoding_step_and_not_counted() -> None:
    executor, memory = FakeExecutor(), Memory()
    limits: Any = speed.Limits(memory, {})  # type: ignore[arg-type]
    with make_engine(executor) as engine:
        wall: list[float] = []

        def run() -> float:
            wall.append(DECODE.run(engine, np.random.default_rng(0)))
            return wall[-1]

        seconds, limit = limits.beside(DECODE, engine, run)
        assert executor.steps == [(6, 2)] + [(2, 2)] * 4 and memory.reads == 4
        assert limit == 7.0 and 0 < seconds <= wall[0] - PAUSE_S
        DECODE.run(engine, np.random.default_rng(0))
        assert memory.reads == 4, "nothing is read afterwards"


def test_products_are_made_before_and_after_a_prefill() -> None:
    with make_engine() as engine:
        limits: Any = speed.Limits(Memory(), {"avx2": Products()})  # type: ignore[arg-type, dict-item]
        assert limits.beside(PREFILL, engine, lambda: 3.0) == (3.0, 5.0)


def test_a_profile_is_without_the_readings() -> None:
    memory = Memory()
    limits: Any = speed.Limits(memory, {})  # type: ignore[arg-type]
    with make_engine() as engine:
        shares = limits.profiled(DECODE, engine, lambda: DECODE.run(engine, np.random.default_rng(0)))
    assert memory.reads == 4 and shares["bandwidth"] == 7.0
    taken = sum(kernel["share_of_step"] for kernel in shares["kernels"].values())
    assert taken + shares["outside_kernels"] == pytest.approx(1, abs=1e-3)
    attention = shares["kernels"]["attention T"]
    assert attention["share_of_bandwidth"] == pytest.approx(attention["gb_per_second"] / 7, abs=1e-2)


def test_read_bandwidth_reads_in_parts() -> None:
    if "avx2" not in host_isas():
        pytest.skip("needs avx2")
    memory = ReadBandwidth(2, mebibytes=8)
    memory.read()
    assert memory.measure(2) > 0
    assert memory.rate([0.5, 1.5]) == pytest.approx(2 * (2 << 20) / 2 / 1e9)
