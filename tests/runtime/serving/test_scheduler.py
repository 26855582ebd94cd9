"""Continuous batching: order, chunks, admission, and rows of logits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.serving.generation import Generation
from belle_compile.runtime.serving.request import SamplingParams
from belle_compile.runtime.serving.sampling import Sampler
from belle_compile.runtime.serving.scheduler import Scheduler
from belle_compile.runtime.serving.scoring import Scoring
from belle_compile.runtime.serving.sequence import Sequence
from belle_compile.runtime.serving.step_loop import StepLoop
from belle_compile.runtime.tokenizer import Tokenizer
from tests.runtime.fakes import VOCABULARY, FakeExecutor, byte_tokenizer, hash_rule, make_request, special_tokens

TOKENIZER = Tokenizer(byte_tokenizer(), special_tokens())


def scheduler(**limits: int) -> Scheduler:
    executor = FakeExecutor(**limits)  # type: ignore[arg-type]
    return Scheduler(executor.batch, executor.num_blocks)


def run_step(s: Scheduler) -> list[Sequence]:
    """A step whose every answer goes on with token 9."""
    needing_logits = s.schedule()
    s.commit()
    for sequence in needing_logits:
        sequence.append(9)
        if sequence.length == sequence.max_length:
            s.remove(sequence)
    return needing_logits


def test_long_prompt_is_cut_into_chunks_and_wants_logits_at_its_end_only() -> None:
    s = scheduler(max_tokens=8)
    sequence = Sequence(range(20), 2)
    s.add(sequence)
    rows = []
    for _ in range(3):
        run_step(s)
        rows.append((s.batch.tokens, s.batch.rows, int(s.batch.positions[0])))
    assert rows == [(8, 0, 0), (8, 0, 8), (4, 1, 16)]
    assert s.batch.logit_rows[0] == 3
    assert run_step(s) == [sequence] and not s.has_work
    assert list(s.batch.positions[:1]) == [20] and s.batch.tokens == 1


def test_answers_under_way_go_first_beside_a_long_prompt() -> None:
    s = scheduler(max_tokens=8)
    short, long = Sequence([5, 6], 10), Sequence(range(30), 3)
    s.add(short)
    run_step(s)
    s.add(long)
    assert run_step(s) == [short]
    assert list(s.batch.token_ids[:8]) == [9, 0, 1, 2, 3, 4, 5, 6]
    assert list(s.batch.positions[:8]) == [2, 0, 1, 2, 3, 4, 5, 6]
    assert list(s.batch.sequences[:8]) == [short.slot] + [long.slot] * 7


def test_a_sequence_waits_until_its_known_tokens_fit_and_nobody_overtakes_it() -> None:
    s = scheduler(num_blocks=4, max_tokens=24)
    first, big, small = Sequence([1] * 20, 20), Sequence([2] * 20, 30), Sequence([3], 3)
    for sequence in (first, big, small):
        s.add(sequence)
    run_step(s)
    run_step(s)  # two blocks are free, but one of them is kept for the answer under way
    assert s.running == [first] and len(s.waiting) == 2
    while first in s.running:
        run_step(s)
    run_step(s)
    assert s.running == [big, small]


def test_no_more_sequences_than_rows() -> None:
    s = scheduler(max_sequences=5, max_rows=2)
    for _ in range(4):
        s.add(Sequence([1], 3))
    assert len(run_step(s)) == 2
    while s.has_work:
        assert len(run_step(s)) <= 2


def test_removed_sequences_free_everything() -> None:
    s = scheduler(max_sequences=2)
    sequences = [Sequence([1] * 30, 5) for _ in range(3)]
    for sequence in sequences:
        s.add(sequence)
    run_step(s)
    for sequence in [*sequences, *sequences]:
        s.remove(sequence)
    assert not s.has_work and s.pool.available == s.pool.num_blocks
    s.add(sequences[0])
    s.schedule()
    assert s.running == [sequences[0]]


def test_what_never_fits_is_refused() -> None:
    s = scheduler(max_blocks=4, num_blocks=2)
    with pytest.raises(EngineError, match="found 65 tokens, expected at most 64, the engine's longest context; shorten it"):
        s.add(Sequence([1] * 60, 5))
    with pytest.raises(EngineError, match="found 33 tokens, expected at most 32, the KV cache's capacity; load with more"):
        s.add(Sequence([1] * 30, 3))


def test_scored_sequence_takes_the_rows_that_no_other_may_need() -> None:
    s = scheduler(max_tokens=24, max_rows=6, max_sequences=5)
    answer, scored, prompt = Sequence([1, 2], 9), Sequence(range(30), 0, logits_from=4), Sequence([3] * 5, 2)
    s.add(answer)
    run_step(s)
    for sequence in (scored, prompt):
        s.add(sequence)
    assert s.schedule() == [answer, scored, prompt]
    # Of six rows one is the answer's and one that of the prompt, which may come into the step.
    assert [sequence.logit_rows for sequence in (answer, scored, prompt)] == [1, 4, 1]
    assert [sequence.scheduled for sequence in (answer, scored, prompt)] == [1, 8, 5]
    assert list(s.batch.logit_rows[: s.batch.rows]) == [0, 5, 6, 7, 8, 13]
    s.commit()
    s.remove(answer)
    s.remove(prompt)
    assert s.schedule() == [scored] and (s.batch.tokens, s.batch.rows, scored.logit_rows) == (6, 6, 6)


def test_scored_sequence_without_rows_in_a_step_needs_no_logits() -> None:
    s = scheduler(max_tokens=8)
    scored = Sequence(range(17), 0, logits_from=16)
    s.add(scored)
    steps = []
    while scored.computed < 17:
        steps.append((s.schedule(), s.batch.tokens, s.batch.rows))
        s.commit()
    assert steps == [([], 8, 0), ([], 8, 0), ([scored], 1, 1)]


@settings(deadline=None, max_examples=80)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 7),
    max_tokens=st.integers(1, 30),
    max_rows=st.integers(1, 8),
    max_sequences=st.integers(1, 5),
    num_blocks=st.integers(4, 16),
)
def test_answers_and_scores_do_not_depend_on_what_they_share_steps_with(seed: int, count: int, **limits: int) -> None:
    random = np.random.default_rng(seed)
    jobs: list[Generation | Scoring] = []
    for _ in range(count):
        prompt = random.integers(3, VOCABULARY, random.integers(1, 40)).tolist()
        if random.random() < 0.5:
            jobs.append(Scoring(prompt, int(random.integers(len(prompt))), VOCABULARY))
        else:
            params = SamplingParams(
                temperature=0.9, repetition_penalty=1.2, seed=1, max_new_tokens=int(random.integers(1, 20)),
                prompt_lookup=int(random.integers(4)),
            )  # fmt: skip
            jobs.append(Generation(make_request(prompt, params), TOKENIZER))
    executor = FakeExecutor(**limits)  # type: ignore[arg-type]
    loop = StepLoop(executor)
    loop.submit(jobs)
    for job in jobs:
        assert job.done.wait(30)
        tokens = [int(token) for token in job.sequence.tokens]
        if isinstance(job, Scoring):
            rows = job.result()
            start = len(tokens) - len(rows)
            np.testing.assert_array_equal(rows, [hash_rule(tokens[: i + 1]) for i in range(start, len(tokens))])
        else:
            sampler, prompt = Sampler(job.request), list(job.request.prompt)
            assert job.result().token_ids == [sampler.sample(hash_rule(tokens[:i])) for i in range(len(prompt), len(tokens))]
    assert loop.call(lambda: loop.scheduler.pool.available) == limits["num_blocks"]
    loop.stop()
