"""Executors that compute answers with other bits than prompts: answers are neither shared nor guessed, and none changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from belle_compile.runtime.executors import StepBatch
from belle_compile.runtime.serving.request import SamplingParams
from belle_compile.runtime.serving.scheduling import SchedulerOptions
from belle_compile.runtime.serving.step_loop import StepLoop
from tests.runtime.fakes import make_request
from tests.runtime.serving.workload import IDENTITY, ApartExecutor, Streamed, alone, outcome, random_request, run

FAR = 1 << 20
GREEDY = SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=40)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 9),
    max_tokens=st.integers(2, 30),
    max_rows=st.integers(1, 8),
    max_sequences=st.integers(1, 6),
    num_blocks=st.integers(4, 14),
    prefix_cache=st.booleans(),
    rope_from=st.sampled_from([FAR, FAR, 8, 21, 40]),
)
def test_batches_prefixes_and_preemptions_change_no_answer(
    seed: int, count: int, prefix_cache: bool, rope_from: int, **limits: int
) -> None:
    random = np.random.default_rng(seed)
    requests = [random_request(random) for _ in range(count)]
    dynamic = None if rope_from == FAR else rope_from
    loop = StepLoop(ApartExecutor(rope_from, **limits), SchedulerOptions(prefix_cache=prefix_cache), IDENTITY, dynamic)
    jobs = [Streamed(request) for request in requests]
    run(loop, jobs)
    loop.stop()
    roomy = ApartExecutor(rope_from, **{**limits, "num_blocks": 64})
    assert [outcome(job) for job in jobs] == alone(roomy, requests, dynamic)


def test_answers_that_were_preempted_are_those_alone() -> None:
    requests = [make_request([n, 3, n] * 6, GREEDY) for n in range(10, 15)]
    loop = StepLoop(ApartExecutor(FAR, num_blocks=7), None, IDENTITY)
    jobs = [Streamed(request) for request in requests]
    run(loop, jobs)
    assert loop.scheduler.preemptions
    loop.stop()
    assert [outcome(job) for job in jobs] == alone(ApartExecutor(FAR, num_blocks=64), requests)


def test_prompts_are_shared_and_answers_are_not() -> None:
    executor = ApartExecutor(FAR, num_blocks=64, max_blocks=16)
    loop, prompt = StepLoop(executor, None, IDENTITY), [n % 7 + 3 for n in range(50)]
    first = Streamed(make_request(prompt, GREEDY))
    run(loop, [first])
    second = Streamed(make_request([*prompt, *first.result().token_ids, 9], GREEDY))
    run(loop, [second])
    loop.stop()
    assert second.cached_tokens == len(prompt)


@pytest.mark.parametrize("lookup", [0, 5])
def test_nothing_is_guessed(lookup: int) -> None:
    params = SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=20, prompt_lookup=lookup)
    loop = StepLoop(ApartExecutor(FAR, num_blocks=64), None, IDENTITY)
    job = Streamed(make_request([5, 6, 7] * 8, params))
    run(loop, [job])
    loop.stop()
    assert job.result().drafted == 0


def test_rows_that_share_blocks_have_no_more_than_the_cache() -> None:
    """Ten prompts of 4 common blocks and one of their own, in a cache of 16 blocks, of which each that runs leaves one:
    two at a time, where sharing saves nothing."""
    executor = ApartExecutor(FAR, num_blocks=16, max_sequences=8, max_tokens=64)
    executor.batch.blocks_per_row = True
    most, plain = [0], executor.step

    def step(batch: StepBatch) -> Any:
        most.append(sum(len(sequence.blocks.blocks) for sequence in loop.scheduler.running if sequence.blocks))
        return plain(batch)

    executor.step = step  # type: ignore[method-assign]
    loop = StepLoop(executor, None, IDENTITY)
    prompts = [[*(n % 7 + 3 for n in range(64)), 20 + n] for n in range(10)]
    requests = [
        make_request(prompt, SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=9)) for prompt in prompts
    ]
    jobs = [Streamed(request) for request in requests]
    run(loop, jobs)
    loop.stop()
    assert max(most) == 10 and sum(job.cached_tokens for job in jobs) > 0
    assert [outcome(job) for job in jobs] == alone(ApartExecutor(FAR, num_blocks=64), requests)
