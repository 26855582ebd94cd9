"""Continuous batching: order, chunks, admission."""

from __future__ import annotations

import pytest

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.serving.scheduler import Scheduler, Sequence
from tests.runtime.fakes import FakeExecutor


def scheduler(**limits: int) -> Scheduler:
    executor = FakeExecutor(**limits)  # type: ignore[arg-type]
    return Scheduler(executor.batch, executor.num_blocks)


def run_step(s: Scheduler) -> list[Sequence]:
    """A step whose every answer goes on with token 9."""
    wanting = s.schedule()
    s.commit()
    for sequence in wanting:
        sequence.append(9)
        if sequence.length == sequence.max_length:
            s.remove(sequence)
    return wanting


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


def test_a_sequence_waits_until_its_worst_case_fits_and_nobody_overtakes_it() -> None:
    s = scheduler(num_blocks=4, max_tokens=24)
    first, big, small = Sequence([1] * 20, 20), Sequence([2] * 20, 30), Sequence([3], 3)
    for sequence in (first, big, small):
        s.add(sequence)
    run_step(s)
    assert s.running == [first] and list(s.waiting) == [big, small]
    while first in s.running:
        run_step(s)
    run_step(s)
    assert s.running == [big] and list(s.waiting) == [small]


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
    assert not s.has_work and s.allocator.available == s.allocator.num_blocks
    s.add(sequences[0])
    s.schedule()
    assert s.running == [sequences[0]]


def test_what_never_fits_is_refused() -> None:
    s = scheduler(max_blocks=4, num_blocks=2)
    with pytest.raises(EngineError, match="found 65 tokens, expected at most 64, the engine's longest context; shorten it"):
        s.add(Sequence([1] * 60, 5))
    with pytest.raises(EngineError, match="found 33 tokens, expected at most 32, the KV cache's capacity; load with more"):
        s.add(Sequence([1] * 30, 3))


def test_admit_without_a_free_row() -> None:
    s = scheduler(max_sequences=1)
    s.admit(Sequence([1], 1))
    with pytest.raises(EngineError, match="every sequence of the batch is in use; wait for other requests"):
        s.admit(Sequence([1], 1))
