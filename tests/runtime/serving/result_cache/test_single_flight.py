"""Identical requests under way are computed once, and none of them depends on another's staying."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from belle_compile.runtime import Engine, EngineError, SamplingParams
from belle_compile.runtime.serving.result_cache.options import CachePolicy
from tests.runtime.fakes import FakeExecutor, make_engine
from tests.runtime.serving.result_cache.helpers import (
    GREEDY,
    SEEDED,
    GatedExecutor,
    answer,
    cache_of,
    cached_engine,
    counts,
    stats_of,
    wait_for,
)

PROMPT = [5, 6, 7]
LONG = SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=60)


def in_flight(engine: Engine) -> int:
    return len(cache_of(engine)._flights._flights)


def assert_nothing_is_left(engine: Engine) -> None:
    """No flight, member or sequence is under way, and all blocks are free."""
    cache_of(engine).flush()
    flights = cache_of(engine)._flights
    wait_for(lambda: engine._loop.idle and not flights._flights and not flights._of)
    pool = engine._loop.scheduler.pool
    assert engine._loop.call(lambda: pool.available) == pool.num_blocks


def test_threads_with_one_question_compute_one_answer() -> None:
    executor = GatedExecutor()
    with cached_engine(executor) as engine, ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(engine.generate, [PROMPT], SEEDED) for _ in range(8)]
        wait_for(lambda: cache_of(engine).stats().shared == 7)
        executor.allow_all()
        results = [future.result()[0] for future in asked]
        assert len(executor.steps) == 9 and {tuple(result.token_ids) for result in results} == {tuple(results[0].token_ids)}
        assert sorted(result.cached for result in results) == [False] + [True] * 7
        assert counts(engine) == {"misses": 1, "shared": 7, "stores": 1}
        assert_nothing_is_left(engine)


def test_followers_get_pieces_as_they_come() -> None:
    executor = GatedExecutor()
    with make_engine() as plain:
        pieces = list(plain.stream(PROMPT, LONG))
    with cached_engine(executor) as engine:
        (first, *others) = [engine.stream(PROMPT, LONG) for _ in range(3)]
        executor.allow(30)
        wait_for(lambda: len(executor.steps) == 30)
        late = engine.stream(PROMPT, LONG)
        for stream in (first, *others, late):
            for expected in pieces[:5]:
                assert next(stream) == expected, "while the answer is under way"
        assert not first._generation.done.is_set()
        executor.allow_all()
        for stream in (first, *others, late):
            assert list(stream) == pieces[5:]
        assert len({stream.result.text for stream in (first, *others, late)}) == 1
        assert [stream.result.cached for stream in (first, *others, late)] == [False, True, True, True]
        assert_nothing_is_left(engine)


@pytest.mark.parametrize("leaves", ["close", "forgotten"])
@pytest.mark.parametrize("after", [0, 5])
def test_an_answer_outlives_the_request_that_began_it(after: int, leaves: str) -> None:
    executor = GatedExecutor()
    with make_engine() as plain:
        (expected,) = plain.generate([PROMPT], LONG)
    with cached_engine(executor) as engine:
        first = engine.stream(PROMPT, LONG)
        second, third = engine.stream(PROMPT, LONG), engine.stream(PROMPT, LONG)
        executor.allow(after)
        wait_for(lambda: len(executor.steps) == after)
        if leaves == "close":
            first.close()
            first.close()
            with pytest.raises(EngineError, match="the request was withdrawn"):
                list(first)
        else:
            del first
            gc.collect()
        third.close()
        executor.allow_all()
        assert "".join(second) == expected.text and answer(second.result) == answer(expected)
        (hit,) = engine.generate([PROMPT], LONG)
        assert hit.cached and answer(hit) == answer(expected) and len(executor.steps) == 60
        assert_nothing_is_left(engine)


def test_followers_get_log_probabilities() -> None:
    params = SamplingParams(temperature=0.7, seed=2, logprobs=2, prompt_logprobs=1, max_new_tokens=40)
    executor = GatedExecutor()
    with make_engine() as plain:
        (expected,) = plain.generate([PROMPT], params)
    with cached_engine(executor) as engine:
        streams = [engine.stream(PROMPT, params) for _ in range(2)]
        executor.allow(20)
        wait_for(lambda: len(executor.steps) == 20)
        streams.append(engine.stream(PROMPT, params))
        executor.allow_all()
        for stream in streams:
            deltas = list(stream.deltas())
            assert [scored for delta in deltas for scored in delta.logprobs or ()] == expected.logprobs
            assert answer(stream.result) == answer(expected)
        assert_nothing_is_left(engine)


def test_event_loops_share_flights_and_may_leave() -> None:
    executor = GatedExecutor()
    with make_engine() as plain:
        (expected,) = plain.generate([PROMPT], LONG)

    async def main(engine: Engine) -> None:
        first = asyncio.create_task(engine.agenerate([PROMPT], LONG))
        await asyncio.sleep(0)
        second = engine.astream(PROMPT, LONG)
        third, fourth = engine.astream(PROMPT, LONG), asyncio.create_task(engine.agenerate([PROMPT, PROMPT], LONG))
        await asyncio.sleep(0)
        assert cache_of(engine).stats().shared == 4
        executor.allow(7)
        first.cancel()
        third.close()
        with pytest.raises(EngineError, match="the request was withdrawn"):
            _ = [piece async for piece in third]
        with pytest.raises(asyncio.CancelledError):
            await first
        executor.allow_all()
        assert "".join([piece async for piece in second]) == expected.text
        assert [answer(result) for result in await fourth] == [answer(expected)] * 2

    with cached_engine(executor) as engine:
        asyncio.run(asyncio.wait_for(main(engine), 60))
        assert len(executor.steps) == 60
        assert_nothing_is_left(engine)


def test_the_last_one_to_leave_drops_the_answer() -> None:
    executor = GatedExecutor(max_sequences=1)
    with cached_engine(executor) as engine:
        streams = [engine.stream(PROMPT, LONG) for _ in range(3)]
        executor.allow(3)
        wait_for(lambda: len(executor.steps) == 3)
        for stream in streams:
            stream.close()
        for stream in streams:
            with pytest.raises(EngineError, match="the request was withdrawn"):
                list(stream)
        again = engine.stream(PROMPT, LONG)  # does not join what is being dropped
        executor.allow_all()
        assert "".join(again) and not again.result.cached
        assert len(executor.steps) <= 4 + 60
        assert_nothing_is_left(engine)


def test_an_answer_that_fails_fails_for_all() -> None:
    executor = GatedExecutor()
    with cached_engine(executor) as engine, ThreadPoolExecutor(3) as threads:
        asked = [threads.submit(engine.generate, [PROMPT], GREEDY) for _ in range(3)]
        wait_for(lambda: cache_of(engine).stats().shared == 2)
        executor.failure = RuntimeError("kernel broke")
        executor.allow_all()
        for future in asked:
            with pytest.raises(RuntimeError, match="kernel broke"):
                future.result()
        assert stats_of(engine).stores == 0
        assert not engine.generate([PROMPT], GREEDY)[0].cached
        assert_nothing_is_left(engine)


def test_closing_ends_all() -> None:
    executor = GatedExecutor()
    engine = cached_engine(executor)
    streams = [engine.stream(PROMPT, LONG) for _ in range(3)]
    executor.allow_all()
    engine.close()
    for stream in streams:
        with pytest.raises(EngineError, match="the engine is closed"):
            list(stream)


def test_one_that_must_compute_does_not_join() -> None:
    executor = GatedExecutor()
    with cached_engine(executor) as engine:
        first = engine.stream(PROMPT, GREEDY)
        second = engine.stream(PROMPT, GREEDY, cache=CachePolicy(no_cache=True))
        executor.allow_all()
        assert "".join(first) == "".join(second) and not second.result.cached
        assert_nothing_is_left(engine)


def test_an_answer_is_stored_if_one_of_its_requests_allows_it() -> None:
    executor = GatedExecutor()
    with cached_engine(executor) as engine:
        first = engine.stream(PROMPT, GREEDY, cache=CachePolicy(no_store=True))
        second = engine.stream(PROMPT, GREEDY)
        executor.allow_all()
        assert "".join(first) == "".join(second)
        assert stats_of(engine).stores == 1


@pytest.mark.parametrize("store", ["memory", "sqlite"])
def test_any_order_of_asking_and_leaving(store: str, tmp_path: object) -> None:
    questions = [([3 + i] * (2 + 5 * i), SamplingParams(temperature=0.9, seed=i, max_new_tokens=20)) for i in range(4)]
    with make_engine() as plain:
        expected = {i: plain.generate([prompt], params)[0] for i, (prompt, params) in enumerate(questions)}
    wrong: list[object] = []
    name = "memory" if store == "memory" else f"sqlite:{tmp_path}/cache.db"
    with cached_engine(FakeExecutor(), name, max_bytes=1100, audit=0.2) as engine:  # room for one or two entries

        def ask(seed: int) -> None:
            choose = random.Random(seed)
            try:
                for _ in range(25):
                    i = choose.randrange(4)
                    prompt, params = questions[i]
                    policy = CachePolicy(choose.random() < 0.1, choose.random() < 0.2)
                    if choose.random() < 0.3:
                        results = engine.generate([prompt], params, cache=policy)
                    else:
                        stream = engine.stream(prompt, params, cache=policy)
                        stay = choose.choice([0, 1, 3, 1000, 1000])
                        text = "".join(piece for piece, _ in zip(stream, range(stay), strict=False))
                        if stay < 1000:
                            assert expected[i].text.startswith(text)
                            if choose.random() < 0.5:
                                stream.close()
                            continue
                        results = [stream.result]
                    assert answer(results[0]) == answer(expected[i])
            except BaseException as error:
                wrong.append(error)

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        assert not wrong, wrong
        gc.collect()
        stats = stats_of(engine)
        assert stats.hits and stats.misses and stats.shared and stats.evictions and not stats.errors
        wait_for(lambda: not cache_of(engine)._auditor.active)
        assert stats_of(engine).audit_differences == 0
        assert_nothing_is_left(engine)
