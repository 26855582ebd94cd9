"""Few blocks: sequences are preempted and computed anew, and no answer changes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from belle_compile.runtime.serving.generation import Generation
from belle_compile.runtime.serving.request import SamplingParams
from belle_compile.runtime.serving.scheduler import Scheduler
from belle_compile.runtime.serving.scheduling import SchedulerOptions, Scheduling
from belle_compile.runtime.serving.scoring import Scoring
from belle_compile.runtime.serving.sequence import Sequence
from belle_compile.runtime.serving.step_loop import StepLoop
from tests.runtime.fakes import EOS, VOCABULARY, CandidateExecutor, FakeExecutor, make_request
from tests.runtime.serving.workload import IDENTITY, TOKENIZER, DynamicExecutor, Streamed, alone, outcome, random_request, run

FIELDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "seeded": {"temperature": 1.0, "seed": 4},
    "penalties": {"temperature": 0.9, "seed": 1, "repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.2},
    "logprobs": {"temperature": 0.9, "seed": 2, "logprobs": 3},
    "prompt_logprobs": {"temperature": 0, "prompt_logprobs": 2, "logprobs": 0},
    "prompt_lookup": {"temperature": 0, "prompt_lookup": 4},
    "stop": {"temperature": 0.9, "seed": 3, "stop": ("zz", "e")},
    "min_tokens": {"temperature": 0.9, "seed": 3, "min_tokens": 20, "stop_token_ids": (40, 41, 42), "top_k": 20},
}


@pytest.mark.parametrize("kind", [FakeExecutor, CandidateExecutor])
@pytest.mark.parametrize("prefix_cache", [True, False], ids=["prefixes", "no prefixes"])
@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_answers_that_were_preempted_are_those_alone(fields: dict[str, Any], prefix_cache: bool, kind: Any) -> None:
    params = SamplingParams(max_new_tokens=40, **{"repetition_penalty": 1, **fields})
    requests = [make_request([n, 3, n] * 6, params, eos=(EOS,)) for n in range(10, 15)]
    loop = StepLoop(kind(num_blocks=7), SchedulerOptions(prefix_cache=prefix_cache), IDENTITY)
    jobs = [Streamed(request) for request in requests]
    run(loop, jobs)
    stats = loop.stats({}, None)
    loop.stop()
    assert [outcome(job) for job in jobs] == alone(kind(num_blocks=64), requests)
    if "stop" not in fields:
        assert stats.preemptions > 0 and stats.kv_blocks_used == 0
        assert (stats.recomputed_tokens > 0) >= (not prefix_cache)
        assert sum(job.sequence.preemptions for job in jobs) == stats.preemptions


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 9),
    max_tokens=st.integers(2, 30),
    max_rows=st.integers(1, 8),
    max_sequences=st.integers(1, 6),
    num_blocks=st.integers(4, 14),
    prefix_cache=st.booleans(),
    candidates=st.booleans(),
    rope_from=st.sampled_from([None, None, 8, 21, 40]),
)
def test_random_arrivals_cancellations_and_preemptions_change_no_answer(
    seed: int, count: int, prefix_cache: bool, candidates: bool, rope_from: int | None, **limits: int
) -> None:
    random = np.random.default_rng(seed)

    def executor(**changes: int) -> FakeExecutor:
        if rope_from is not None:
            return DynamicExecutor(rope_from, **{**limits, **changes})
        return (CandidateExecutor if candidates else FakeExecutor)(**{**limits, **changes})  # type: ignore[arg-type]

    requests = [random_request(random) for _ in range(count)]
    loop = StepLoop(executor(), SchedulerOptions(prefix_cache=prefix_cache), IDENTITY, rope_from)
    jobs: list[Generation] = []
    for request in requests:
        job = Streamed(request) if random.random() < 0.5 else Generation(request, TOKENIZER)
        client = str(random.choice(["a", "b", "c"]))
        job.accompany(
            Scheduling(int(random.integers(2)), 600.0 if random.random() < 0.2 else None, client), lambda record: None
        )
        jobs.append(job)
        loop.submit([job])
        if random.random() < 0.3:
            steps = int(random.integers(4))
            for _ in range(steps):
                loop.call(lambda: None)
    withdrawn = [job for job in jobs if random.random() < 0.15]
    for job in withdrawn:
        loop.withdraw(job)
    kept = [job for job in jobs if job not in withdrawn]
    for job in jobs:
        assert job.done.wait(60)
    pool = loop.scheduler.pool
    assert loop.call(lambda: (pool.used, pool.available)) == (0, limits["num_blocks"])
    loop.stop()
    assert [outcome(job) for job in kept] == alone(executor(num_blocks=64), [job.request for job in kept], rope_from)


GROWN = SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=30)


@pytest.mark.parametrize("lengths", [(18, 15, 20, 17), (50, 12, 33, 21)], ids=["short prompts", "long prompts"])
def test_what_is_computed_anew_beyond_the_length_where_rope_grows_is_divided_as_before(lengths: tuple[int, ...]) -> None:
    requests = [make_request([n, 3, 5] * 20, GROWN) for n in range(10, 14)]
    requests = [replace(request, prompt=request.prompt[:n]) for request, n in zip(requests, lengths, strict=True)]
    loop = StepLoop(DynamicExecutor(20, num_blocks=7), None, IDENTITY, 20)
    jobs = [Streamed(request) for request in requests]
    run(loop, jobs)
    assert loop.scheduler.preemptions
    loop.stop()
    assert [outcome(job) for job in jobs] == alone(DynamicExecutor(20, num_blocks=64), requests, 20)


def test_only_keys_that_do_not_depend_on_the_steps_are_shared() -> None:
    """Chunks of long prompts end at 20, 40, ...; the keys of tokens behind the first one depend on the length of the prompt."""
    shared = [n % 7 + 3 for n in range(60)]
    lengths = (60, 36, 30, 60, 45, 33, 60)
    requests = [make_request([*shared[:n], 90 + i], GROWN) for i, n in enumerate(lengths)]
    limits = {"max_tokens": 24, "max_sequences": 5, "num_blocks": 64}
    loop = StepLoop(DynamicExecutor(38, **limits), None, IDENTITY, 38)
    jobs = [Streamed(request) for request in requests]
    for job in jobs:
        run(loop, [job])
    loop.stop()
    assert [job.cached_tokens for job in jobs] == [0, 20, 30, 19, 19, 33, 19]
    assert [outcome(job) for job in jobs] == alone(DynamicExecutor(38, **limits), requests, 38)


@pytest.mark.parametrize("start", [0, 7])
def test_scores_are_computed_once_a_row_also_beyond_the_length_where_rope_grows(start: int) -> None:
    ids = [(7 * i) % VOCABULARY for i in range(60)]
    rows = []
    for load in (False, True):
        executor = DynamicExecutor(20, max_tokens=24, max_rows=6, max_sequences=5, num_blocks=8)
        loop = StepLoop(executor, None, IDENTITY, 20)
        scoring = Scoring(ids, start, VOCABULARY)
        others = [Streamed(make_request([n] * 20, SamplingParams(temperature=0, max_new_tokens=30))) for n in (4, 5, 6)]
        loop.submit([*others, scoring] if load else [scoring])
        assert scoring.done.wait(60)
        for job in others if load else []:
            assert job.done.wait(60)
        rows.append(scoring.result())
        assert not load or loop.scheduler.preemptions
        loop.stop()
    np.testing.assert_array_equal(*rows)


def test_a_long_prompt_under_dynamic_rope_is_divided_by_its_length_alone() -> None:
    """24 tokens and 5 sequences a step: chunks of 20 tokens, the first of which may be divided, for it ends below 25."""
    s = Scheduler(FakeExecutor(max_tokens=24, max_sequences=5, num_blocks=16).batch, 16, None, 25)
    short, long = Sequence([1, 2], 30), Sequence(range(70), 3)
    s.add(short)
    steps(s, 1)
    s.add(long)
    assert steps(s, 5, long) == [20, 20, 20, 10, 1]
    other = Sequence(range(9), 3)
    late = Sequence(range(100, 160), 3)
    s.add(other)
    s.add(late)  # its first 14 tokens have room beside the others, and the next chunk ends where it always does
    assert steps(s, 4, late) == [13, 7, 20, 20]


def steps(s: Scheduler, count: int, of: Sequence | None = None) -> list[int]:
    """Run steps, in which answers go on with token 9; returns the tokens of a sequence in each."""
    tokens = []
    for _ in range(count):
        needing_logits = s.schedule()
        tokens.append(of.scheduled if of in [*s.running] and of is not None else 0)
        s.commit()
        for sequence in needing_logits:
            sequence.append(9)
            if sequence.length == sequence.max_length:
                s.remove(sequence)
    return tokens


def test_the_last_in_order_is_preempted_and_the_first_never() -> None:
    s = Scheduler(FakeExecutor(num_blocks=6, max_tokens=64, max_sequences=5).batch, 6)
    urgent = Sequence([1] * 30, 30, scheduling=Scheduling(priority=-1))
    early, late = Sequence([2] * 15, 40), Sequence([3] * 15, 40)
    for sequence in (early, late, urgent):  # the urgent one is the last to arrive
        s.add(sequence)
    ended: list[Sequence] = []
    preempted: list[Sequence] = []
    while s.has_work:
        before = {sequence: sequence.preemptions for sequence in (urgent, early, late)}
        for sequence in s.schedule():
            sequence.append(9)
        s.commit()
        preempted += [sequence for sequence in before if sequence.preemptions > before[sequence]]
        for sequence in [sequence for sequence in s.running if sequence.length == sequence.max_length]:
            s.remove(sequence)
            ended.append(sequence)
    assert ended == [urgent, early, late]
    assert preempted[0] is late and urgent not in preempted and s.pool.used == 0


def test_a_sequence_that_fits_alone_ends_beside_any_others() -> None:
    """Each takes the whole cache at its end."""
    s = Scheduler(FakeExecutor(num_blocks=4, max_blocks=4).batch, 4)
    sequences = [Sequence([n] * 10, 54) for n in range(3, 8)]
    for sequence in sequences:
        s.add(sequence)
    count = 0
    while s.has_work:
        for sequence in s.schedule():
            sequence.append(9)
            if sequence.length == sequence.max_length:
                s.remove(sequence)
        s.commit()
        count += 1
        assert count < 54 * 5 * 5
    assert all(sequence.length == 64 for sequence in sequences) and s.preemptions > 0
