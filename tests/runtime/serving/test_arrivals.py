"""Requests that arrive together share the first step of an idle engine."""

from __future__ import annotations

import threading

import pytest

from belle_compile.runtime.serving import step_loop
from belle_compile.runtime.serving.generation import Generation
from belle_compile.runtime.serving.request import SamplingParams
from belle_compile.runtime.serving.step_loop import StepLoop
from belle_compile.runtime.tokenizer import Tokenizer
from tests.runtime.fakes import FakeExecutor, byte_tokenizer, make_request, special_tokens

WAIT_S = 10.0
TOKENIZER = Tokenizer(byte_tokenizer(), special_tokens())


def generation(prompt: list[int]) -> Generation:
    params = SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=3)
    return Generation(make_request(prompt, params), TOKENIZER)


@pytest.mark.parametrize("refused", [False, True])
def test_the_first_step_has_what_was_announced(refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_loop, "ARRIVALS_S", WAIT_S)
    executor = FakeExecutor()
    loop = StepLoop(executor)
    for _ in range(2):
        loop.arrivals.begin()
    jobs = [generation([3]), generation([4, 5])]
    for job in jobs[: 1 if refused else 2]:  # each wakes the loop's thread
        loop.submit([job])
        assert not executor.steps
    for _ in range(2):
        loop.arrivals.end()
    assert jobs[0].done.wait(WAIT_S) and loop.arrivals.announced == 0
    loop.stop()
    assert executor.steps[0] == ((1, 1) if refused else (3, 2))


def test_a_full_step_waits_for_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_loop, "ARRIVALS_S", 10 * WAIT_S)
    executor = FakeExecutor()
    loop, jobs = StepLoop(executor), [generation([3] * (executor.batch.max_tokens - 1)), generation([4])]
    for _ in range(2):
        loop.arrivals.begin()
    for job in jobs:
        assert not executor.steps
        loop.submit([job])
    for job in jobs:
        assert job.done.wait(WAIT_S)
    loop.stop()
    assert executor.steps[0] == (executor.batch.max_tokens, 2) and loop.arrivals.announced == 2


def test_what_is_announced_and_never_submitted_holds_up_nobody() -> None:
    loop, job = StepLoop(FakeExecutor()), generation([3])
    loop.arrivals.begin()
    loop.submit([job])
    assert job.done.wait(WAIT_S) and len(job.result().token_ids) == 3
    loop.stop()


def test_a_loop_that_runs_waits_for_no_arrival(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_loop, "ARRIVALS_S", 10 * WAIT_S)
    executor, at_second, go_on = FakeExecutor(), threading.Event(), threading.Event()
    step = executor.step

    def held(batch: object) -> object:
        if len(executor.steps) == 1:
            at_second.set()
            assert go_on.wait(WAIT_S)
        return step(batch)  # type: ignore[arg-type]

    monkeypatch.setattr(executor, "step", held)
    loop, jobs = StepLoop(executor), [generation([3]), generation([4])]
    loop.submit(jobs[:1])
    assert at_second.wait(WAIT_S)
    loop.arrivals.begin()
    loop.submit(jobs[1:])
    go_on.set()
    for job in jobs:
        assert job.done.wait(WAIT_S)
    loop.stop()
