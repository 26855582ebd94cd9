"""Executors of several ranks over fake models: ranks are threads, each with its part of the logits and its own cache."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from belle_compile.runtime import Engine, EngineError, SamplingParams
from belle_compile.runtime.distributed.agreement import Agreement
from belle_compile.runtime.distributed.collectives import Collectives
from belle_compile.runtime.distributed.executor import RankedExecutor, ranked_executor, serve
from belle_compile.runtime.executors import ProfilableExecutor, StepBatch
from belle_compile.runtime.profiling import Recorder
from tests.runtime.fakes import VOCABULARY, FakeExecutor, make_engine


class Threads:
    """Collectives of ranks that are threads, but for sums, which fakes have none of."""

    def __init__(self, rank: int, ranks: int, down: list[queue.Queue[np.ndarray]], up: list[queue.Queue[np.ndarray]]) -> None:
        self.rank, self.ranks, self.ranks_here, self.sharing, self.rank_here = rank, ranks, ranks, ranks, rank
        self.shared = None
        self.down, self.up = down, up
        self.sent: list[int] = []  # lengths
        self.closed = False

    def memory(self, size: int) -> np.ndarray:
        raise NotImplementedError

    def all_reduce(self, values: np.ndarray) -> None:
        raise NotImplementedError

    def broadcast(self, message: np.ndarray, length: int = 0) -> None:
        if self.rank:
            data = self.down[self.rank].get(timeout=10)
            message[: len(data)] = data
            return
        self.sent.append(length)
        for other in self.down[1:]:
            other.put(message[:length].copy())

    def gather(self, message: np.ndarray, length: int, into: list[np.ndarray]) -> None:
        self.up[self.rank].put(message[:length].copy())
        if self.rank == 0:
            for buffer, results in zip(into, self.up, strict=True):
                data = results.get(timeout=10)
                buffer[: len(data)] = data

    def agree(self, report: bytes, judge: Callable[[dict[int, bytes]], bytes], timeout_s: float) -> bytes:
        raise NotImplementedError

    def close(self) -> None:
        self.closed = True


class Part(FakeExecutor):
    """One rank's part of the logits."""

    def __init__(self, rank: int, ranks: int, **limits: int) -> None:
        super().__init__(**limits)  # type: ignore[arg-type]
        self.first, end = VOCABULARY * rank // ranks, VOCABULARY * (rank + 1) // ranks
        self.count = end - self.first
        self.span, self.sums = (self.first, self.count), ()
        self.joined: list[Collectives] = []

    def join(self, collectives: Collectives) -> None:
        self.joined.append(collectives)

    def step(self, batch: StepBatch) -> np.ndarray:
        return np.ascontiguousarray(super().step(batch)[:, self.first : self.first + self.count])


class Ranks:
    """Rank 0's executor; the other ranks are served by threads."""

    def __init__(self, ranks: int, **limits: int) -> None:
        down, up = ([queue.Queue() for _ in range(ranks)] for _ in range(2))  # type: ignore[var-annotated]
        self.parts = [Part(rank, ranks, **limits) for rank in range(ranks)]
        self.collectives = [Threads(rank, ranks, down, up) for rank in range(ranks)]
        self.threads = [
            threading.Thread(target=serve, args=(part, line), daemon=True)
            for part, line in zip(self.parts[1:], self.collectives[1:], strict=True)
        ]
        for thread in self.threads:
            thread.start()
        spans, kernels = tuple(part.span for part in self.parts), tuple(f"kernels-{rank}" for rank in range(ranks))
        agreement = Agreement(spans, self.parts[0].num_blocks, kernels)
        self.executor = ranked_executor(self.parts[0], self.collectives[0], agreement)


@contextmanager
def engine_of(ranks: int, **limits: int) -> Iterator[tuple[Engine, Ranks]]:
    made = Ranks(ranks, **limits)
    with make_engine(made.executor) as engine:  # type: ignore[arg-type]
        yield engine, made
    for thread in made.threads:
        thread.join(10)
        assert not thread.is_alive()
    assert all(part.closed for part in made.parts) and all(line.closed for line in made.collectives)


REQUESTS = [
    SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=9),
    SamplingParams(temperature=0, repetition_penalty=1.5, max_new_tokens=30),
    SamplingParams(temperature=0, repetition_penalty=0.5, max_new_tokens=9, prompt_lookup=3),
    SamplingParams(temperature=1.0, top_k=7, top_p=0.9, repetition_penalty=1.1, seed=5, max_new_tokens=9),
    SamplingParams(temperature=1.0, top_k=0, top_p=0.9, seed=11, max_new_tokens=9),
    SamplingParams(temperature=0, repetition_penalty=1.0, max_new_tokens=40, prompt_lookup=4),
]
PROMPTS = [[7 + i, 8, 7 + i, 8] * (1 + 4 * i) for i in range(len(REQUESTS))]


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("limits", [{}, {"max_tokens": 5, "max_rows": 2}, {"num_blocks": 9}, {"max_sequences": 1}], ids=str)
def test_answers_are_those_of_one_rank(limits: dict[str, int], ranks: int) -> None:
    with make_engine(FakeExecutor(**limits)) as engine:  # type: ignore[arg-type]
        expected = [result.token_ids for result in engine.generate(PROMPTS, REQUESTS)]
    with engine_of(ranks, **limits) as (engine, made):
        for _ in range(2):  # the second time in blocks that others wrote to
            assert [result.token_ids for result in engine.generate(PROMPTS, REQUESTS)] == expected
        for part in made.parts[1:]:
            assert part.steps == made.parts[0].steps
            np.testing.assert_array_equal(part.cache, made.parts[0].cache)


def test_all_logits_are_gathered_where_they_are_asked_for() -> None:
    ids = [3, 9, 27, 81, 5, 4, 3, 2, 1, 17, 18]
    with make_engine() as engine:
        expected = engine.logits(ids)
    with engine_of(3, max_tokens=4, max_rows=3) as (engine, _):
        engine.generate([[1, 2]], REQUESTS[0])  # whose count of candidates stays in the batch
        np.testing.assert_array_equal(engine.logits(ids), expected)


def test_only_rows_of_the_block_table_that_changed_are_sent() -> None:
    with engine_of(2) as (engine, made):
        engine.generate([[1] * 10], SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=20))
    width = made.executor.batch.block_table.shape[1]
    first, *others, end = made.collectives[0].sent
    assert end == 4 and first == 4 + 3 * 10 + 2 + 5 * (1 + width)
    assert sorted(set(others)) == [4 + 3 + 2, 4 + 3 + 2 + 1 + width] and others.count(9 + 1 + width) == 1


def test_each_rank_copies_the_blocks_of_a_step() -> None:
    made = Ranks(2)
    executor, batch = made.executor, made.executor.batch
    batch.block_table[:2, :2] = [[3, 4], [5, 6]]
    batch.token_ids[:4], batch.positions[:4], batch.sequences[:4] = [7, 8, 9, 10], range(4), 0
    batch.tokens, batch.rows = 4, 0
    executor.step(batch)
    batch.token_ids[0], batch.positions[0], batch.sequences[0], batch.tokens = 11, 2, 1, 1
    batch.copies = [(3, 5), (5, 0)]
    executor.step(batch)
    batch.token_ids[0], batch.positions[0], batch.copies = 12, 3, []
    executor.step(batch)
    executor.close()
    made.threads[0].join(10)
    for part in made.parts:
        assert [part.cache[block, :4].tolist() for block in (3, 5, 0)] == [[7, 8, 9, 10], [7, 8, 11, 12], [7, 8, 9, 10]]
    tokens, more = 4 + 3 * 4 + 5 * (1 + batch.block_table.shape[1]), 4 + 3
    assert made.collectives[0].sent == [tokens, more + 2 * 2, more, 4]


def test_profile_is_of_rank_0() -> None:
    with engine_of(2) as (engine, made):
        executor = made.executor
        assert isinstance(executor, ProfilableExecutor)
        executor.record(recorder := Recorder(executor.program, executor.batch))
        assert made.parts[0].recorder is recorder and made.parts[1].recorder is None
        executor.record(None)
        engine.generate([[1]], REQUESTS[0])


def test_a_step_that_fails_is_the_last() -> None:
    made = Ranks(2)
    with make_engine(made.executor) as engine:  # type: ignore[arg-type]
        made.parts[0].failure = EngineError("cpu", "kernel broke")
        with pytest.raises(EngineError, match="kernel broke"):
            engine.generate([[1]], REQUESTS[0])
        with pytest.raises(EngineError, match="an earlier step failed, and the ranks are out of step since; load the engine"):
            engine.generate([[1]], REQUESTS[0])
    assert made.parts[0].closed and not made.collectives[0].closed  # so that the process' end ends the others
    made.collectives[0].broadcast(np.zeros(4, np.int32), 4)
    made.threads[0].join(10)


def test_the_fewest_blocks_count() -> None:
    made = Ranks(2)
    executor = RankedExecutor(made.parts[0], made.collectives[0], Agreement(((0, 150), (150, 150)), 3, ("avx2", "amx")))
    with make_engine(executor) as engine:  # type: ignore[arg-type]
        assert engine.max_context == 48


def test_ranks_without_a_program_cannot_be_profiled() -> None:
    made = Ranks(2)
    assert isinstance(made.executor, ProfilableExecutor)
    del made.parts[0].program
    executor = ranked_executor(made.parts[0], made.collectives[0], Agreement(((0, 150), (150, 150)), 3, ("avx2", "amx")))
    assert not isinstance(executor, ProfilableExecutor)
    executor.close()
