"""The scheduler and the prefix cache: nothing is computed twice, nobody waits for ever, and answers are those computed cold."""

from __future__ import annotations

from typing import Any

import pytest

from belle_compile.runtime.serving.request import SamplingParams
from belle_compile.runtime.serving.scheduler import Scheduler
from belle_compile.runtime.serving.scheduling import SchedulerOptions
from belle_compile.runtime.serving.sequence import Sequence
from belle_compile.runtime.serving.step_loop import StepLoop
from tests.runtime.fakes import CandidateExecutor, FakeExecutor, make_engine, make_request
from tests.runtime.serving.workload import IDENTITY, Streamed, alone, outcome, run

GREEDY = SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=8)
SYSTEM = [(3 * n) % 200 + 3 for n in range(150)]
ROOM: dict[str, int] = {"max_tokens": 24, "max_blocks": 16, "max_sequences": 5, "num_blocks": 96}


def distinct_tokens(prompts: list[list[int]]) -> int:
    """Tokens that differ in what they follow, and the last token of each prompt, whose logits are always computed."""
    prefixes = {tuple(prompt[: i + 1]) for prompt in prompts for i in range(len(prompt))}
    return len(prefixes)


@pytest.mark.parametrize("kind", [FakeExecutor, CandidateExecutor])
def test_one_system_prompt_is_computed_once_for_requests_that_come_together(kind: Any) -> None:
    prompts = [[*SYSTEM, 220 + n, n + 3] for n in range(32)]
    requests = [make_request(prompt, GREEDY) for prompt in prompts]
    loop = StepLoop(kind(**ROOM), None, IDENTITY)
    jobs = [Streamed(request) for request in requests]
    run(loop, jobs)
    stats = loop.stats({}, None)
    loop.stop()
    assert stats.prompt_tokens == distinct_tokens(prompts) == len(SYSTEM) + 64
    assert (stats.prefix_queries, stats.prefix_hits) == (32 * 152, 31 * 150)
    assert [job.result().cached_tokens for job in jobs] == [0] + [150] * 31
    assert [outcome(job) for job in jobs] == alone(kind(**ROOM), requests)


def test_n_answers_share_their_prompt() -> None:
    params = SamplingParams(temperature=1.0, seed=3, n=4, max_new_tokens=9)
    with make_engine(FakeExecutor(**ROOM)) as engine:
        results = engine.generate([SYSTEM], params)
        stats = engine.stats()
    assert stats.prompt_tokens == len(SYSTEM) + 3, "the last token of each, for its logits"
    with make_engine(FakeExecutor(**ROOM), scheduler=SchedulerOptions(prefix_cache=False)) as engine:
        cold = engine.generate([SYSTEM], params)
        assert engine.stats().prompt_tokens == 4 * len(SYSTEM) and engine.stats().prefix_queries == 0
    assert [result.token_ids for result in results] == [result.token_ids for result in cold]
    assert [result.cached_tokens for result in results] == [0, 149, 149, 149]


def test_the_next_turn_of_a_chat_computes_what_is_new() -> None:
    with make_engine(FakeExecutor(**ROOM)) as engine:
        (first,) = engine.generate([SYSTEM], GREEDY)
        (second,) = engine.generate([[*SYSTEM, *first.token_ids, 9, 9]], GREEDY)
        assert second.cached_tokens == len(SYSTEM) + len(first.token_ids) - 1  # the last token was never computed
        salted = SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=8, cache_salt="other tenant")
        (apart,) = engine.generate([[*SYSTEM, *first.token_ids, 9, 9]], salted)
        assert apart.cached_tokens == 0 and apart.token_ids == second.token_ids


@pytest.mark.parametrize("fields", [{"prompt_logprobs": 1}, {"prompt_logprobs": 0, "logprobs": 2, "prompt_lookup": 3}])
def test_prompts_that_are_scored_are_computed_and_shared_with_those_that_are_not(fields: dict[str, Any]) -> None:
    scored = make_request(SYSTEM, SamplingParams(temperature=0, max_new_tokens=5, **fields))
    plain = make_request(SYSTEM, SamplingParams(temperature=0, max_new_tokens=5))
    loop = StepLoop(FakeExecutor(**ROOM), None, IDENTITY)
    jobs = [Streamed(request) for request in (plain, scored, scored, plain)]
    for job in jobs:
        run(loop, [job])
    loop.stop()
    assert [job.cached_tokens for job in jobs] == [0, 0, 0, 149]
    assert [outcome(job) for job in jobs] == alone(FakeExecutor(**ROOM), [job.request for job in jobs])


def prompts_of_one_prefix(count: int) -> tuple[Scheduler, list[Sequence]]:
    """A scheduler in whose first step the first of several prompts with one prefix of 150 tokens begins; the others wait.

    The first one is scored, so that it takes a few tokens a step.
    """
    s = Scheduler(FakeExecutor(**ROOM).batch, 96, None, None, IDENTITY)
    sequences = [Sequence([*SYSTEM, 220 + n], 4, logits_from=None if n else 0) for n in range(count)]
    for sequence in sequences:
        s.add(sequence)
    step(s)
    assert s.running == sequences[:1] and s.held == sequences[1:]
    return s, sequences


def step(s: Scheduler) -> None:
    needing_logits = s.schedule()
    s.commit()
    for sequence in needing_logits:
        if sequence.logits_from + sequence.logit_rows < sequence.length:
            sequence.logits_from += sequence.logit_rows
        else:
            sequence.append(9)
        if sequence.length == sequence.max_length:
            s.remove(sequence)


@pytest.mark.parametrize("steps", [1, 3])
def test_when_the_one_that_computes_a_prefix_is_given_up_the_next_one_goes_on(steps: int) -> None:
    s, (first, second, third) = prompts_of_one_prefix(3)
    for _ in range(steps - 1):
        step(s)
    s.remove(first)
    step(s)
    assert s.running == [second] and s.held == [third]
    assert second.cached_tokens == 4 * steps, "what the first one computed is not lost"
    while s.has_work:
        step(s)
    assert third.cached_tokens == 150 and s.pool.used == 0


def test_one_that_waits_for_a_prefix_can_be_removed() -> None:
    s, (first, second) = prompts_of_one_prefix(2)
    s.remove(second)
    s.remove(second)
    while s.has_work:
        step(s)
    assert s.pool.used == 0 and first.length == first.max_length


def test_nobody_waits_longer_for_a_prefix_than_one_step_a_token() -> None:
    """A prompt that gets no room in the steps does not hold up the one that waits for it for ever."""
    s, (_, second) = prompts_of_one_prefix(2)
    for _ in range(len(SYSTEM)):
        assert second.slot < 0
        s.schedule()  # and never commit
        s.discard()
    assert second.slot >= 0 and not s.held


def test_others_overtake_one_that_waits_for_a_prefix() -> None:
    s, (first, second) = prompts_of_one_prefix(2)
    other = Sequence([5] * 4, 2)
    s.add(other)
    for _ in range(7):
        step(s)
    assert other.length == other.max_length and second.length == len(SYSTEM) + 1 and first in s.running
