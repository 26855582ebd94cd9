"""A step waits for no mask of a grammar: its answer sits out of steps until the mask is there, whatever happens meanwhile."""

from __future__ import annotations

import dataclasses
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from belle_compile.runtime import Engine, EngineError, Grammar, Result, ResultCacheOptions, SamplingParams
from belle_compile.runtime.executors import StepBatch
from belle_compile.runtime.serving.generation import Generation
from belle_compile.runtime.serving.grammar import constraint
from belle_compile.runtime.serving.grammar.source import GrammarFailure
from belle_compile.runtime.serving.grammar.workers import Workers, quick_workers, slow_workers
from belle_compile.runtime.serving.scheduler import Scheduler
from belle_compile.runtime.serving.scheduling import DeadlineExceeded, Scheduling, Withdrawn
from belle_compile.runtime.serving.sequence import Sequence
from belle_compile.runtime.serving.telemetry import RequestRecord, StepRecord
from belle_compile.runtime.tokenizer import Tokenizer
from tests.runtime.fakes import CandidateExecutor, FakeExecutor, byte_tokenizer, manifest, special_tokens

WAIT_S = 30.0
TOKENIZER = Tokenizer(byte_tokenizer(), special_tokens())  # with the process that tries grammars out
GREEDY: dict[str, Any] = {"temperature": 0.0, "repetition_penalty": 1.1}
WORD = Grammar("regex", "[a-d]{3,9}(你|好)+!")


class Masks:
    """Computes masks when the test says so, in place of the threads that would do it at once."""

    def __init__(self) -> None:
        self.waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self.submitted: list[Workers] = []
        self._came = threading.Condition()

    def submit(self, workers: Workers, task: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        with self._came:
            self.submitted.append(workers)
            self.waiting.append((future, task))
            self._came.notify_all()
        return future

    def release(self, place: int = 0, error: Exception | None = None) -> None:
        """Compute a mask as soon as it is asked for, or fail in its place."""
        with self._came:
            assert self._came.wait_for(lambda: len(self.waiting) > place, WAIT_S)
            self.waiting.rotate(-place)
            future, task = self.waiting.popleft()
            self.waiting.rotate(place)
        if future.set_running_or_notify_cancel():
            if error:
                future.set_exception(error)
            else:
                future.set_result(task())

    def release_until(self, done: Callable[[], bool], order: random.Random | None = None) -> None:
        """Compute the masks that are asked for, in their order or in another one, until a condition holds."""
        ends = time.monotonic() + WAIT_S
        while not done():
            assert time.monotonic() < ends
            with self._came:
                self._came.wait_for(lambda: bool(self.waiting), 0.001)
                count = len(self.waiting)
            if count:
                self.release(order.randrange(count) if order else 0)


class ReusingExecutor(FakeExecutor):
    """Overwrites the logits of the step before, as a real one does."""

    last: NDArray[np.float32] | None = None

    def step(self, batch: StepBatch) -> NDArray[np.float32]:
        if self.last is not None:
            self.last[:] = np.nan
        self.last = super().step(batch)
        return self.last


@contextmanager
def held_masks() -> Iterator[Masks]:
    """No mask is computed but by `Masks.release`."""
    masks = Masks()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Workers, "submit", lambda workers, task: masks.submit(workers, task))
        yield masks


def engine_of(executor: FakeExecutor | None = None, cache: ResultCacheOptions | None = None, **options: Any) -> Engine:
    return Engine(manifest(), TOKENIZER, executor or FakeExecutor(num_blocks=96, max_blocks=32), cache, **options)


Asked = tuple[str | list[int], SamplingParams]


def submit_all(engine: Engine, asked: list[Asked], **options: Any) -> list[Generation]:
    jobs = [Generation(engine.resolve(*one), engine.tokenizer) for one in asked]
    engine.submit(jobs, **options)
    return jobs


def submit(engine: Engine, asked: Asked, **options: Any) -> Generation:
    return submit_all(engine, [asked], **options)[0]


def finished(job: Generation) -> Result:
    assert job.done.wait(WAIT_S)
    return job.result()


def answer(result: Result) -> tuple[Any, ...]:
    return result.token_ids, result.text, result.finish_reason, result.logprobs, result.prompt_logprobs


def answers_alone(asked: list[Asked]) -> list[tuple[Any, ...]]:
    """The answers of an engine that computes each mask at once and has one request at a time."""
    with engine_of() as engine:
        return [answer(engine.generate([prompt], params)[0]) for prompt, params in asked]


def wait_for(condition: Callable[[], bool]) -> None:
    ends = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.001)


HELD: Asked = ("hello", SamplingParams(**GREEDY, max_new_tokens=40, grammar=WORD))
PLAIN: Asked = ("hello", SamplingParams(**GREEDY, max_new_tokens=12))
OTHER: Asked = ("there", SamplingParams(**GREEDY, max_new_tokens=12))


@pytest.fixture(scope="module")
def expected() -> list[Any]:
    return answers_alone([HELD, PLAIN, OTHER])


@pytest.mark.parametrize("before", [0, 1, 3], ids=["first mask", "second mask", "fourth mask"])
@pytest.mark.parametrize("kind", [ReusingExecutor, CandidateExecutor])
def test_others_go_on_while_a_mask_is_computed(kind: Any, before: int, expected: list[Any]) -> None:
    executor = kind(num_blocks=96, max_blocks=32)
    with held_masks() as masks, engine_of(executor) as engine:
        held = submit(engine, HELD)
        for _ in range(before):
            masks.release()
        wait_for(lambda: engine.stats().steps == before + 1)
        others = [submit(engine, asked) for asked in (PLAIN, OTHER)]
        assert [answer(finished(job)) for job in others] == expected[1:]
        assert not held.done.is_set() and len(held.sequence.generated) == before
        stats, steps = engine.stats(), len(executor.steps)
        assert (stats.running, stats.waiting, stats.generated_tokens) == (1, 0, 24 + before)
        masks.release_until(held.done.is_set)
        assert answer(finished(held)) == expected[0]
        assert executor.steps[steps:] == [(1, 1)] * (len(expected[0][0]) - before - 1), "no row is computed twice"


def test_a_mask_that_fails_ends_its_answer_alone(expected: list[Any]) -> None:
    with held_masks() as masks, engine_of() as engine:
        held, other = submit(engine, HELD), submit(engine, PLAIN)
        assert answer(finished(other)) == expected[1]
        masks.release(error=GrammarFailure("it is too much"))
        with pytest.raises(EngineError, match="the answer cannot be held to its grammar: found it is too much"):
            finished(held)
        wait_for(lambda: engine.stats().running == 0)
        assert answer(finished(submit(engine, OTHER))) == expected[2]


def test_an_answer_is_given_up_while_its_mask_is_computed(expected: list[Any]) -> None:
    with held_masks() as masks, engine_of() as engine:
        held, late = submit(engine, HELD), submit(engine, HELD, scheduling=Scheduling(timeout_s=0.05))
        assert answer(finished(submit(engine, PLAIN))) == expected[1]
        engine.withdraw(held)
        for job, error in ((held, Withdrawn), (late, DeadlineExceeded)):
            with pytest.raises(error):
                finished(job)
        wait_for(lambda: engine.stats().kv_blocks_used == 0)
        assert {future.cancelled() for future, _ in masks.waiting} == {True}, "nobody needs these masks"
        assert answer(finished(submit(engine, OTHER))) == expected[2]


def test_a_mask_that_comes_after_its_answer_was_given_up_changes_nothing(expected: list[Any]) -> None:
    with held_masks() as masks, engine_of() as engine:
        held = submit(engine, HELD)
        wait_for(lambda: engine.stats().steps == 1)
        future, task = masks.waiting.popleft()
        assert future.set_running_or_notify_cancel()
        engine.withdraw(held)
        with pytest.raises(Withdrawn):
            finished(held)
        future.set_result(task())
        assert answer(finished(submit(engine, PLAIN))) == expected[1] and not held.sequence.generated


def test_the_engine_is_closed_while_a_mask_is_computed() -> None:
    with held_masks() as masks:
        engine = engine_of()
        held = submit(engine, HELD)
        wait_for(lambda: engine.stats().steps == 1)
        engine.close()
        with pytest.raises(EngineError, match="the engine is closed"):
            finished(held)
        assert masks.waiting[0][0].cancelled()


def test_a_step_that_fails_ends_those_that_wait_for_masks_too(expected: list[Any]) -> None:
    executor = FakeExecutor()
    with held_masks(), engine_of(executor) as engine:
        held = submit(engine, HELD)
        wait_for(lambda: engine.stats().steps == 1)
        executor.failure = RuntimeError("kernel broke")
        for job in (submit(engine, PLAIN), held):
            with pytest.raises(RuntimeError, match="kernel broke"):
                finished(job)
        assert answer(finished(submit(engine, OTHER))) == expected[2]


def test_answers_that_wait_for_masks_are_preempted() -> None:
    # The first answer needs five of the six blocks, so that the others, which wait for their masks, lose theirs.
    asked: list[Asked] = [([5] * 12, SamplingParams(**GREEDY, max_new_tokens=60)), ([6] * 12, HELD[1]), ([7] * 12, HELD[1])]
    wanted = answers_alone(asked)
    with held_masks() as masks, engine_of(FakeExecutor(num_blocks=6)) as engine:
        first, *others = submit_all(engine, asked)
        assert answer(finished(first)) == wanted[0]
        assert any(job.sequence.preemptions for job in others) and not any(job.sequence.generated for job in others)
        masks.release_until(lambda: all(job.done.is_set() for job in others))
        assert [answer(finished(job)) for job in others] == wanted[1:]


def test_a_preempted_answer_takes_its_token_before_it_runs_again() -> None:
    asked: list[Asked] = [([5] * 20, SamplingParams(**GREEDY, max_new_tokens=75)), ([6] * 12, HELD[1])]
    wanted = answers_alone(asked)
    executor = FakeExecutor(num_blocks=6)
    with held_masks() as masks, engine_of(executor) as engine:
        holding, step = threading.Event(), executor.step
        first, held = jobs = [Generation(engine.resolve(*one), engine.tokenizer) for one in asked]

        def held_step(batch: Any) -> Any:
            if held.sequence.preemptions and not held.sequence.generated:
                assert holding.wait(WAIT_S)
            return step(batch)

        executor.step = held_step  # type: ignore[method-assign]
        engine.submit(jobs)
        wait_for(lambda: held.sequence.preemptions > 0)
        masks.release()
        holding.set()
        wait_for(lambda: len(held.sequence.generated) == 1)
        masks.release_until(lambda: held.done.is_set() and first.done.is_set())
        assert [answer(finished(job)) for job in jobs] == wanted


def test_a_step_that_only_preempts_admits_others_at_once() -> None:
    executor = FakeExecutor(num_blocks=4)
    scheduler = Scheduler(executor.batch, executor.num_blocks)
    waits, grows, urgent = (Sequence([3] * n, 40, scheduling=Scheduling(priority=p)) for n, p in ((20, 0), (16, 1), (16, 0)))

    def step() -> list[Sequence]:
        needing_logits = scheduler.schedule()
        if executor.batch.tokens:
            executor.step(executor.batch)
            scheduler.commit()
        return needing_logits

    scheduler.add(waits)
    scheduler.add(grows)
    while waits.computed < waits.length or grows.computed < grows.length:
        step()
    scheduler.add(urgent)  # it has no block until the one with the higher number needs another one
    while grows.length < 33:
        grows.append(5)
        assert urgent.slot < 0
        scheduled = step()
    assert scheduled == [urgent] and grows.preemptions == 1 and waits.slot >= 0
    assert not step() and not executor.batch.tokens, "all that run have to take their logits"
    waits.append(5)
    assert step() == [waits]


def test_answers_do_not_depend_on_when_masks_come() -> None:
    seeded = {**GREEDY, "temperature": 1.5, "seed": 5}
    repeated = Grammar("regex", "(hello there, ){6}")
    grammars: list[dict[str, Any]] = [
        {**GREEDY, "grammar": WORD, "prompt_logprobs": 1, "logprobs": 2},
        {**GREEDY, "grammar": repeated, "prompt_lookup": 4},
        {**seeded, "grammar": Grammar("regex", "[a-z]{20,30}")},
        {**seeded, "grammar": Grammar("regex", "(你|好){15}"), "prompt_lookup": 2},
    ]
    asked: list[Asked] = [("hello there, hello there, ", SamplingParams(**one, max_new_tokens=50)) for one in grammars]
    asked += [("hello there, hello there", dataclasses.replace(OTHER[1], prompt_lookup=3, max_new_tokens=60)),
              ([9] * 3, dataclasses.replace(OTHER[1], logprobs=1, max_new_tokens=60))]  # fmt: skip
    wanted = answers_alone(asked)
    preemptions = 0
    for seed in range(6):
        order = random.Random(seed)
        executor = ReusingExecutor(num_blocks=6 if seed % 2 else 96, max_tokens=9, max_rows=9)
        with held_masks() as masks, engine_of(executor) as engine:
            jobs = submit_all(engine, order.sample(asked, len(asked)))
            masks.release_until(lambda jobs=jobs: all(job.done.is_set() for job in jobs), order)  # type: ignore[misc]
            together = {job.request: answer(finished(job)) for job in jobs}
            assert [together[engine.resolve(*one)] for one in asked] == wanted
            preemptions += engine.stats().preemptions
            lookups = [job.result().accepted for job in jobs if job.request.grammar == repeated]
            assert lookups[0] > 0, "guesses are confirmed from rows that waited"
    assert preemptions > 0


def test_identical_requests_share_an_answer_that_waits(expected: list[Any]) -> None:
    with held_masks() as masks, engine_of(cache=ResultCacheOptions()) as engine:
        first, second = submit(engine, HELD), submit(engine, HELD)
        assert answer(finished(submit(engine, PLAIN))) == expected[1]
        engine.withdraw(first)  # the second one still wants the answer
        masks.release_until(second.done.is_set)
        assert answer(finished(second)) == expected[0] and second.cached
        with pytest.raises(Withdrawn):
            finished(first)
        assert answer(finished(submit(engine, HELD))) == expected[0] and not masks.waiting


def test_streams_and_generate_wait_for_their_own_masks_only(expected: list[Any]) -> None:
    with held_masks() as masks, engine_of() as engine:
        results: list[Result] = []
        waiting = threading.Thread(
            target=lambda: results.extend(engine.generate([HELD[0]], dataclasses.replace(HELD[1], n=2))), daemon=True
        )
        waiting.start()
        assert "".join(engine.stream(*PLAIN)) == expected[1][1]
        assert waiting.is_alive()
        masks.release_until(lambda: not waiting.is_alive())
        assert [answer(result) for result in results] == [expected[0]] * 2


def test_gaps_before_tokens_that_waited_are_reported(expected: list[Any]) -> None:
    class Observer:
        gaps: ClassVar[list[float]] = []

        def step(self, record: StepRecord) -> None:
            self.gaps += record.token_gaps

        def ended(self, record: RequestRecord) -> None:
            pass

    with held_masks() as masks, engine_of(telemetry=Observer()) as engine:
        held = submit(engine, HELD)
        masks.release_until(held.done.is_set)
        finished(submit(engine, OTHER))
    lengths = [len(tokens) for tokens, *_ in (expected[0], expected[2])]
    assert len(Observer.gaps) == sum(lengths) - 2 and min(Observer.gaps) > 0


class Clock:
    """The processor time of a thread, which each mask takes 10 ms of."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.01
        return self.now


def test_an_answer_with_slow_masks_leaves_the_usual_threads_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    with held_masks() as masks, engine_of() as engine:
        quick = submit(engine, HELD)
        for _ in range(4):
            masks.release()
        assert set(masks.submitted) == {quick_workers()}
        engine.withdraw(quick)
        masks.submitted.clear()
        monkeypatch.setattr(constraint.time, "thread_time", Clock())
        slow = submit(engine, HELD)
        masks.release_until(slow.done.is_set)
        assert masks.submitted[:2] == [quick_workers()] * 2 and set(masks.submitted[3:]) == {slow_workers()}


def test_slow_masks_have_threads_of_a_lower_priority() -> None:
    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    quick, slow = (workers.submit(niceness).result(WAIT_S) for workers in (quick_workers(), slow_workers()))
    assert quick == niceness() and slow == min(19, quick + 10)


def test_a_fork_has_threads_of_its_own() -> None:
    assert quick_workers().submit(os.getpid).result(WAIT_S) == os.getpid()
    if not (child := os.fork()):
        done = False
        try:
            done = quick_workers().submit(os.getpid).result(WAIT_S) == os.getpid()
        finally:
            os._exit(0 if done else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_task_that_was_given_up_is_not_run() -> None:
    started, go = threading.Event(), threading.Event()

    def busy() -> bool:
        started.set()
        return go.wait(WAIT_S)

    workers = Workers(1)
    first, ran = workers.submit(busy), []
    assert started.wait(WAIT_S)
    given_up, last = workers.submit(lambda: ran.append(1)), workers.submit(lambda: ran.append(2))
    assert given_up.cancel()
    go.set()
    last.result(WAIT_S)
    assert first.result(WAIT_S) and ran == [2]
