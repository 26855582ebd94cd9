"""Counts, records of steps and requests, deadlines, the bounded queue and the end of the step thread, as an engine has them."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from belle_compile.runtime.engine import AsyncStream, Engine
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.serving.request import SamplingParams
from belle_compile.runtime.serving.result_cache.options import ResultCacheOptions
from belle_compile.runtime.serving.scheduling import DeadlineExceeded, QueueFull, SchedulerOptions, Scheduling
from belle_compile.runtime.serving.telemetry import RequestRecord, StepRecord
from tests.runtime.fakes import FakeExecutor, hash_rule, make_engine

WAIT_S = 30.0
GREEDY = SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=6)
SOON = Scheduling(timeout_s=0.05)


class Observer:
    """Keeps all records."""

    def __init__(self) -> None:
        self.steps: list[StepRecord] = []
        self.requests: list[RequestRecord] = []

    def step(self, record: StepRecord) -> None:
        self.steps.append(record)

    def ended(self, record: RequestRecord) -> None:
        self.requests.append(record)


class HeldExecutor(FakeExecutor):
    """Every step waits until the gate is open."""

    def __init__(self, rule: Any = hash_rule, **limits: int) -> None:
        super().__init__(rule, **limits)
        self.reached, self.open = threading.Event(), threading.Event()

    def step(self, batch: Any) -> Any:
        self.reached.set()
        assert self.open.wait(WAIT_S)
        return super().step(batch)


def wait_for(condition: Callable[[], bool]) -> None:
    ends = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.001)


def test_steps_and_requests_are_reported() -> None:
    observer = Observer()
    with make_engine(FakeExecutor(max_tokens=8), telemetry=observer) as engine:
        engine.generate([[5] * 12, [6, 7]], GREEDY)
        stats = engine.stats()
    assert [(step.tokens, step.prompt_tokens, step.rows) for step in observer.steps[:2]] == [(8, 8, 0), (6, 6, 2)]
    assert [len(step.token_gaps) for step in observer.steps] == [0, 0, *[2] * 5], "gaps begin with the second token"
    assert all(step.running == 2 and step.waiting == 0 for step in observer.steps[1:-1]) and observer.steps[0].waiting == 1
    assert (stats.prompt_tokens, stats.generated_tokens, stats.steps) == (14, 12, len(observer.steps))
    assert stats.requests == {"stop": 0, "length": 2, "cancelled": 0, "deadline": 0, "error": 0}
    assert stats.last_step_at is not None and stats.last_step_at <= time.monotonic() and stats.result_cache is None
    assert (stats.running, stats.waiting, stats.kv_blocks, stats.kv_blocks_used) == (0, 0, 16, 0)
    assert stats.kv_blocks_cached == 3 and stats.evictions == 0
    first = min(observer.requests, key=lambda record: -record.prompt_tokens)
    assert (first.prompt_tokens, first.generated_tokens, first.end, first.cached, first.preemptions) == (
        12,
        6,
        "length",
        False,
        0,
    )
    assert 0 <= first.queue_s <= first.first_token_s <= first.total_s
    assert math.isclose(first.first_token_s, first.queue_s + first.prefill_s) and first.decode_s > 0


def test_answers_of_the_result_cache_are_reported() -> None:
    observer = Observer()
    with make_engine(result_cache=ResultCacheOptions(), telemetry=observer) as engine:
        for _ in range(2):
            engine.generate([[5, 6]], GREEDY)
        assert [record.cached for record in observer.requests] == [False, True]
        assert engine.stats().requests["length"] == 2 and engine.stats().generated_tokens == 6
        cache = engine.stats().result_cache
        assert cache is not None and cache.hits == 1


def test_preemptions_are_counted() -> None:
    observer, params = Observer(), SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=40)
    with make_engine(FakeExecutor(num_blocks=6), telemetry=observer) as engine:
        engine.generate([[n] * 20 for n in range(5, 9)], params)
        stats = engine.stats()
    assert stats.preemptions == sum(record.preemptions for record in observer.requests) > 0
    assert stats.prompt_tokens >= 80 + stats.recomputed_tokens


def test_a_request_that_is_given_up_frees_its_blocks_before_the_next_step() -> None:
    executor, observer = HeldExecutor(), Observer()
    with make_engine(executor, telemetry=observer) as engine:
        streams = [engine.stream([n] * 20, GREEDY) for n in (5, 6)]
        assert executor.reached.wait(WAIT_S)
        streams[0].close()
        executor.open.set()
        list(streams[1])
        wait_for(lambda: len(observer.requests) == 2)
        assert {record.end for record in observer.requests} == {"cancelled", "length"}
        stats = engine.stats()
        assert (stats.cancellations, stats.running, stats.kv_blocks_used) == (1, 0, 0)
    assert [rows for _, rows in executor.steps].count(2) == 0, "the first one has had no second step"


@pytest.mark.parametrize("cache", [None, ResultCacheOptions()], ids=["computed", "led"])
def test_running_and_waiting_requests_end_at_their_deadline(cache: ResultCacheOptions | None) -> None:
    executor, options = HeldExecutor(max_sequences=1), SchedulerOptions(max_num_seqs=1)
    with make_engine(executor, cache, options) as engine:
        running, waiting = (engine.stream([n] * 20, GREEDY, scheduling=SOON) for n in (5, 6))
        unhurried = engine.stream([7] * 20, GREEDY)
        assert executor.reached.wait(WAIT_S)
        time.sleep(2 * (SOON.timeout_s or 0))
        executor.open.set()
        for stream in (running, waiting):
            with pytest.raises(DeadlineExceeded, match="the request's time was over before its answer was complete"):
                list(stream)
        list(unhurried)
        assert engine.stats().deadlines_missed == 2 and engine.stats().kv_blocks_used == 0
    assert sum(tokens for tokens, _ in executor.steps) == 20 + 20 + 5, "one step of the first, none of the second"


@pytest.mark.parametrize("hurried", ["leader", "follower"])
def test_of_identical_requests_each_has_its_own_deadline(hurried: str) -> None:
    executor = HeldExecutor()
    with make_engine(executor, ResultCacheOptions()) as engine:
        leader = engine.stream([5, 6], GREEDY, scheduling=SOON if hurried == "leader" else None)
        follower = engine.stream([5, 6], GREEDY, scheduling=SOON if hurried == "follower" else None)
        assert executor.reached.wait(WAIT_S)
        time.sleep(2 * (SOON.timeout_s or 0))
        executor.open.set()
        late, patient = (leader, follower) if hurried == "leader" else (follower, leader)
        with pytest.raises(DeadlineExceeded):
            list(late)
        list(patient)
        assert len(patient.result.token_ids) == 6
        assert engine.stats().requests == {"stop": 0, "length": 1, "cancelled": 0, "deadline": 1, "error": 0}


@pytest.mark.parametrize("cache", [None, ResultCacheOptions()], ids=["computed", "cached"])
def test_a_full_queue_refuses_and_keeps_what_it_has(cache: ResultCacheOptions | None) -> None:
    executor = HeldExecutor()
    with make_engine(executor, cache, SchedulerOptions(max_num_seqs=1, max_queue=1)) as engine:
        first = engine.stream([5], GREEDY)
        assert executor.reached.wait(WAIT_S)
        second = engine.stream([6], GREEDY)
        with pytest.raises(QueueFull, match="the queue is full") as refused:
            engine.stream([7], GREEDY)
        assert refused.value.retry_after_s > 0
        with pytest.raises(QueueFull):
            engine.generate([[8], [9]], GREEDY)
        executor.open.set()
        for stream in (first, second):
            list(stream)
        engine.generate([[7]], GREEDY)
        stats = engine.stats()
        assert stats.refusals == 3 and sum(stats.requests.values()) == 3


def test_identical_requests_are_refused_together(tmp_path: Path) -> None:
    """A store in a file is read on another thread, so the stream that leads is refused after the other one has joined it."""
    executor, cache = HeldExecutor(), ResultCacheOptions(f"sqlite:{tmp_path / 'cache.db'}")

    async def ask(engine: Engine) -> list[BaseException | None]:
        streams = [engine.astream([7], GREEDY) for _ in range(3)]
        return await asyncio.gather(*(read(stream) for stream in streams), return_exceptions=True)

    async def read(stream: AsyncStream) -> None:
        async for _ in stream:
            pass

    with make_engine(executor, cache, SchedulerOptions(max_num_seqs=1, max_queue=0)) as engine:
        first = engine.stream([5], GREEDY)
        assert executor.reached.wait(WAIT_S)
        refused = asyncio.run(asyncio.wait_for(ask(engine), WAIT_S))
        assert [type(error) for error in refused] == [QueueFull] * 3
        executor.open.set()
        list(first)
        assert asyncio.run(asyncio.wait_for(ask(engine), WAIT_S)) == [None] * 3


def test_a_client_with_many_requests_does_not_hold_up_another() -> None:
    executor, observer = HeldExecutor(), Observer()
    with make_engine(executor, scheduler=SchedulerOptions(max_num_seqs=1), telemetry=observer) as engine:
        busy = [engine.stream([n] * 5, GREEDY, scheduling=Scheduling(client="busy")) for n in range(5, 10)]
        assert executor.reached.wait(WAIT_S)
        quiet = engine.stream([20] * 4, GREEDY, scheduling=Scheduling(client="quiet"))
        urgent = engine.stream([21] * 3, GREEDY, scheduling=Scheduling(priority=-1, client="busy"))
        executor.open.set()
        for stream in (*busy, quiet, urgent):
            list(stream)
        wait_for(lambda: len(observer.requests) == 7)
    assert [record.prompt_tokens for record in observer.requests][:4] == [5, 3, 4, 5]


def test_many_prompts_of_one_call_are_no_full_queue_by_default() -> None:
    with make_engine() as engine:
        assert len(engine.generate([[n] for n in range(5, 60)], GREEDY)) == 55


def test_no_more_sequences_run_than_were_allowed() -> None:
    observer = Observer()
    with make_engine(scheduler=SchedulerOptions(max_num_seqs=2), telemetry=observer) as engine:
        engine.generate([[n] for n in range(5, 12)], GREEDY)
    assert max(step.rows for step in observer.steps) == 2
    executor = FakeExecutor()
    with pytest.raises(EngineError, match="max_num_seqs: found 6, expected at most 5, which the engine was built for"):
        make_engine(executor, scheduler=SchedulerOptions(max_num_seqs=6))
    assert executor.closed


def test_an_engine_is_alive_until_it_is_closed() -> None:
    executor = HeldExecutor()
    with make_engine(executor) as engine:
        assert engine.alive(WAIT_S), "nothing was to be done yet"
        stream = engine.stream([5], GREEDY)
        assert executor.reached.wait(WAIT_S) and not engine.alive(0.01), "the step does not end"
        executor.open.set()
        list(stream)
        assert engine.alive(WAIT_S) and engine.alive(1e-9), "it moves, or it answers"
    assert not engine.alive(WAIT_S)


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt("stop")])
def test_when_the_step_thread_dies_everything_ends_with_one_error(error: BaseException) -> None:
    executor = HeldExecutor()
    engine = make_engine(executor)
    streams = [engine.stream([n], GREEDY) for n in (5, 6)]
    assert executor.reached.wait(WAIT_S)
    streams.append(engine.stream([7], GREEDY))  # the thread has not received this one
    executor.failure = error
    executor.open.set()
    message = f"engine: the step thread has died: found {type(error).__name__}: .*; load the engine again"
    for stream in streams:
        with pytest.raises(EngineError, match=message):
            list(stream)
    with pytest.raises(EngineError, match=message):
        engine.generate([[8]], GREEDY)
    with pytest.raises(EngineError, match=message):
        engine.logits([8])
    assert not engine.alive(WAIT_S) and engine.stats().requests["error"] == 3
    engine.close()
    assert executor.closed


def test_an_error_outside_of_the_steps_ends_the_thread() -> None:
    class Broken(Observer):
        def ended(self, record: RequestRecord) -> None:
            raise MemoryError("no room for a record")

    engine = make_engine(telemetry=Broken())
    engine.generate([[5]], GREEDY)
    wait_for(lambda: not engine.alive(WAIT_S))
    with pytest.raises(EngineError, match="the step thread has died: found MemoryError: no room for a record"):
        engine.generate([[6]], GREEDY)
    engine.close()


def test_scheduling_reaches_every_way_to_ask() -> None:
    async def ask(engine: Engine) -> None:
        await engine.agenerate([[5] * 9], GREEDY, scheduling=scheduling)
        async with engine.astream([6] * 9, GREEDY, scheduling=scheduling) as stream:
            async for _ in stream:
                pass

    scheduling = Scheduling(priority=3, timeout_s=WAIT_S, client="key")
    seen: list[Scheduling] = []
    with make_engine() as engine:
        submit = engine.submit
        engine.submit = lambda *a, **k: (seen.append(a[2]), submit(*a, **k))[1]  # type: ignore[func-returns-value, method-assign]
        engine.generate([[7] * 9], GREEDY, scheduling=scheduling)
        list(engine.stream([8] * 9, GREEDY, scheduling=scheduling))
        asyncio.run(ask(engine))
    assert seen == [scheduling] * 4
