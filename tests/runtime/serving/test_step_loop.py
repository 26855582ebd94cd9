"""The step loop: nobody waits to submit, and what happens to a job when something fails, is withdrawn or ends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from belle_compile.runtime.engine import Engine, Stream
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.serving.generation import Generation
from belle_compile.runtime.serving.request import SamplingParams
from belle_compile.runtime.serving.sampling import Sampler
from belle_compile.runtime.serving.scoring import Scoring
from belle_compile.runtime.serving.step_loop import StepLoop
from belle_compile.runtime.tokenizer import Tokenizer
from tests.runtime.fakes import (
    VOCABULARY,
    FakeExecutor,
    byte_tokenizer,
    hash_rule,
    make_engine,
    make_request,
    special_tokens,
)

GREEDY = SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=5)
TOKENIZER = Tokenizer(byte_tokenizer(), special_tokens())
WAIT_S = 10.0


class Gate:
    """Holds up calls of a function until it is opened."""

    def __init__(self) -> None:
        self.reached, self._opened = threading.Event(), threading.Event()

    def hold(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def held(*arguments: Any, **options: Any) -> Any:
            self.reached.set()
            assert self._opened.wait(WAIT_S)
            return function(*arguments, **options)

        return held

    def wait_until_reached(self) -> None:
        assert self.reached.wait(WAIT_S)

    def open(self) -> None:
        self._opened.set()


class GatedExecutor(FakeExecutor):
    """Its first step waits at a gate."""

    def __init__(self, rule: Any = hash_rule, **limits: int) -> None:
        super().__init__(rule, **limits)
        self.gate = Gate()
        self.step = self.gate.hold(self.step)  # type: ignore[method-assign]


@contextmanager
def loop_at_its_first_step(executor: GatedExecutor | None = None) -> Iterator[tuple[StepLoop, GatedExecutor, Generation]]:
    """A loop whose first job is in a step that waits at the executor's gate."""
    executor = executor or GatedExecutor()
    loop, job = StepLoop(executor), generation([3])
    loop.submit([job])
    executor.gate.wait_until_reached()
    try:
        yield loop, executor, job
    finally:
        executor.gate.open()
        loop.stop()


def generation(prompt: list[int], params: SamplingParams = GREEDY) -> Generation:
    return Generation(make_request(prompt, params), TOKENIZER)


def answer(job: Generation) -> list[int]:
    assert job.done.wait(WAIT_S)
    return job.result().token_ids


def expected(prompt: list[int], params: SamplingParams = GREEDY) -> list[int]:
    with make_engine() as engine:
        return engine.generate([prompt], params)[0].token_ids


@pytest.mark.parametrize(
    ("owner", "method"), [(FakeExecutor, "step"), (Sampler, "sample"), (Tokenizer, "decode")], ids=["step", "sample", "decode"]
)
def test_submitters_wait_for_nothing(owner: type, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, streams = Gate(), []
    monkeypatch.setattr(owner, method, gate.hold(getattr(owner, method)))

    def submit(engine: Engine) -> None:
        streams.extend([engine.stream([4], GREEDY), engine.stream([5], GREEDY)])

    with make_engine() as engine:
        first = engine.stream([3], GREEDY)
        gate.wait_until_reached()
        submitter = threading.Thread(target=submit, args=(engine,), daemon=True)
        submitter.start()
        submitter.join(WAIT_S / 5)
        submitted = not submitter.is_alive()
        gate.open()
        assert submitted, f"a thread that submits waits for {method}"
        answers: list[list[int]] = []
        stream: Stream
        for stream in (first, *streams):
            list(stream)
            answers.append(stream.result.token_ids)
    monkeypatch.undo()
    assert answers == [expected([prompt]) for prompt in (3, 4, 5)]


def test_jobs_that_come_during_a_step_are_in_the_next_one_together() -> None:
    with loop_at_its_first_step() as (loop, executor, first):
        others = [generation([4] * n) for n in (2, 3)]
        loop.submit(others)
        executor.gate.open()
        for job in (first, *others):
            answer(job)
    assert executor.steps[:3] == [(1, 1), (1 + 2 + 3, 3), (3, 3)]


def test_withdrawn_before_its_first_step_a_job_is_never_scheduled() -> None:
    with loop_at_its_first_step() as (loop, executor, first):
        dropped, scoring = generation([4] * 9), Scoring([5] * 9, 0, VOCABULARY)
        loop.submit([dropped, scoring])
        loop.withdraw(dropped)
        loop.withdraw(scoring)
        executor.gate.open()
        assert answer(first) == expected([3])
    for job in (dropped, scoring):
        with pytest.raises(EngineError, match="the request was withdrawn"):
            job.result()
    assert executor.steps == [(1, 1)] * 5


def test_withdrawn_between_two_steps_a_job_frees_what_it_holds() -> None:
    with loop_at_its_first_step(GatedExecutor(num_blocks=2)) as (loop, executor, first):
        waiting = generation([4] * 20)  # both blocks of the cache
        loop.submit([waiting])
        loop.withdraw(first)
        executor.gate.open()
        assert answer(waiting) == expected([4] * 20)
    with pytest.raises(EngineError, match="the request was withdrawn"):
        first.result()
    assert loop.scheduler.pool.available == 2


def test_withdrawing_a_job_that_has_ended_or_was_never_submitted_does_nothing() -> None:
    executor = FakeExecutor()
    loop, job = StepLoop(executor), generation([3])
    loop.withdraw(generation([4]))
    loop.submit([job])
    answer(job)
    loop.withdraw(job)
    assert loop.call(lambda: len(executor.steps)) == 5 and answer(job) == expected([3])
    loop.stop()


def test_a_call_runs_between_two_steps_and_gives_its_result_or_error() -> None:
    with loop_at_its_first_step() as (loop, executor, job):
        results: list[int] = []
        caller = threading.Thread(target=lambda: results.append(loop.call(lambda: len(executor.steps))), daemon=True)
        caller.start()
        caller.join(0.1)
        assert caller.is_alive(), "the step is under way"
        executor.gate.open()
        caller.join(WAIT_S)
        assert len(results) == 1 and results[0] >= 1
        answer(job)
        assert loop.call(lambda: threading.current_thread().name) == "belle-steps"
        with pytest.raises(ZeroDivisionError):
            loop.call(lambda: 1 // 0)


def test_a_step_that_fails_ends_the_jobs_in_it_and_none_that_came_meanwhile() -> None:
    with loop_at_its_first_step() as (loop, executor, first):
        later = generation([4])
        loop.submit([later])
        executor.failure = RuntimeError("kernel broke")
        executor.gate.open()
        assert answer(later) == expected([4])
        with pytest.raises(RuntimeError, match="kernel broke"):
            answer(first)


@pytest.mark.parametrize("error", [EngineError("sampling", "no"), ZeroDivisionError("no")], ids=["refusal", "bug"])
def test_a_job_that_fails_with_its_logits_ends_alone(error: Exception) -> None:
    class Failing(Generation):
        def accept(self, logits: Any) -> None:
            raise error

    loop = StepLoop(FakeExecutor())
    bad, good = Failing(make_request([3], GREEDY), TOKENIZER), generation([4])
    loop.submit([bad, good])
    assert answer(good) == expected([4])
    with pytest.raises(type(error), match="no"):
        answer(bad)
    loop.stop()


def test_a_job_that_never_fits_ends_alone() -> None:
    loop = StepLoop(FakeExecutor(num_blocks=2))
    bad, good = generation([3] * 40), generation([4])
    loop.submit([bad, good])
    assert answer(good) == expected([4])
    with pytest.raises(EngineError, match="prompt and answer are too long: found 45 tokens, expected at most 32"):
        answer(bad)
    loop.stop()


def test_stop_ends_all_that_waits() -> None:
    with loop_at_its_first_step() as (loop, executor, first):
        queued, errors = generation([4]), []

        def call() -> None:
            with pytest.raises(EngineError) as caught:
                loop.call(lambda: None)
            errors.append(caught.value)

        loop.submit([queued])
        caller = threading.Thread(target=call)
        caller.start()
        caller.join(0.1)
        stopper = threading.Thread(target=loop.stop)
        stopper.start()
        executor.gate.open()
        for thread in (caller, stopper):
            thread.join(WAIT_S)
            assert not thread.is_alive()
    assert executor.closed and executor.steps == [(1, 1)]
    for job in (first, queued):
        with pytest.raises(EngineError, match="the engine is closed; load it again"):
            answer(job)
    assert [str(error) for error in errors] == ["engine: the engine is closed; load it again."]
    with pytest.raises(EngineError, match="the engine is closed"):
        loop.submit([generation([3])])
    loop.stop()


def test_a_loop_without_steps_is_alive_if_its_thread_answers() -> None:
    loop = StepLoop(FakeExecutor())
    loop.call(lambda: None)
    assert loop.alive(WAIT_S)
    loop.stop()
    assert not loop.alive(WAIT_S)


def test_a_loop_without_jobs_stops() -> None:
    executor = FakeExecutor()
    StepLoop(executor).stop()
    assert executor.closed


def test_scoring_shares_its_steps_with_answers() -> None:
    with loop_at_its_first_step(GatedExecutor(max_tokens=6, max_rows=4)) as (loop, executor, job):
        ids = [(7 * i) % 300 for i in range(20)]
        scoring = Scoring(ids, 0, VOCABULARY)
        loop.submit([scoring])
        executor.gate.open()
        assert answer(job) == expected([3])
        assert scoring.done.wait(WAIT_S)
    np.testing.assert_array_equal(scoring.result(), [hash_rule(ids[: i + 1]) for i in range(20)])
    assert executor.steps == [(1, 1), *[(4, 4)] * 4, *[(4, 4)] * 2]  # one row is the answer's while there is one


def _submit_and_close(engine: Engine) -> None:
    engine.stream([5, 6], GREEDY).close()


@pytest.mark.parametrize(
    "flood",
    [lambda engine: engine._loop.call(lambda: None), _submit_and_close],
    ids=["call", "submit"],
)
def test_steps_and_messages_take_turns(flood: Callable[[Engine], None]) -> None:
    """However many messages come, and as long as they do, a step follows those that were there before it."""
    executor = FakeExecutor()
    with make_engine(executor) as engine:
        ended = threading.Event()

        def send() -> None:
            while not ended.is_set():
                flood(engine)

        threads = [threading.Thread(target=send) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            answered = threading.Thread(target=lambda: [engine.generate([[7, 8]], GREEDY) for _ in range(3)])
            answered.start()
            answered.join(WAIT_S)
            assert not answered.is_alive()
        finally:
            ended.set()
            for thread in threads:
                thread.join(WAIT_S)


def test_a_loop_that_never_runs_out_of_messages_steps() -> None:
    """Each message sends the next one."""
    executor = FakeExecutor()
    loop, job = StepLoop(executor), generation([3])
    ended = threading.Event()
    wake = loop.wake

    def after_step() -> None:
        if not ended.is_set():
            wake()

    loop._after_step = after_step
    loop.submit([job])
    assert job.done.wait(WAIT_S) and len(executor.steps) >= GREEDY.max_new_tokens  # type: ignore[operator]
    ended.set()
    loop.stop()


def test_scoring_and_answering_make_progress_side_by_side() -> None:
    """64 threads, of which half score sequences that need more rows of logits than a step has. All answers are as before."""
    with make_engine(FakeExecutor(num_blocks=64)) as engine:
        params = SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=6)
        expected = [engine.generate([[n, 4]], params)[0].token_ids for n in range(32)]
        logits = engine.logits(list(range(3, 43)))
        answers: dict[int, Any] = {}
        done: list[str] = []

        def answer(n: int) -> None:
            for _ in range(3):
                answers[n] = engine.generate([[n, 4]], params)[0].token_ids
                done.append("answer")

        def score(n: int) -> None:
            for _ in range(3):
                found = engine.logits(list(range(3, 43)), start=n % 8)
                answers[32 + n] = np.array_equal(found, logits[n % 8 :])
                done.append("score")

        threads = [threading.Thread(target=kind, args=(n,)) for n in range(32) for kind in (answer, score)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(6 * WAIT_S)
        assert not any(thread.is_alive() for thread in threads)
        assert [answers[n] for n in range(32)] == expected and all(answers[32 + n] for n in range(32))
        assert {"answer", "score"} == set(done[: len(done) // 2]), "each kind in the first half of the time"
