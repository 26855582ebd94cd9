"""Answers from the result cache are those that computing gives, and only what may be stored is."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from belle_compile.runtime import Engine, EngineError, SamplingParams
from belle_compile.runtime.serving.result_cache.entry import Entry
from belle_compile.runtime.serving.result_cache.memory import ENTRY_OVERHEAD, MemoryStore
from belle_compile.runtime.serving.result_cache.options import CachePolicy, ResultCacheOptions
from belle_compile.runtime.serving.result_cache.store import Counters
from tests.runtime.fakes import EOS, FakeExecutor, hash_rule, make_engine, manifest
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
from tests.runtime.serving.result_cache.servers import mute_server, redis_server

NO_CACHE, NO_STORE = CachePolicy(no_cache=True), CachePolicy(no_store=True)
PROMPT = [5, 6, 7]


def ending_rule(context: list[int]) -> np.ndarray:
    """As `hash_rule`, and after some tokens the answer ends."""
    logits = hash_rule(context)
    logits[EOS] = 40 if len(context) > 9 and context[-1] % 5 == 0 else -40
    return logits


REQUESTS = [
    GREEDY,
    SEEDED,
    SamplingParams(temperature=0, repetition_penalty=1.3, max_new_tokens=30),
    SamplingParams(temperature=0, max_new_tokens=1),
    SamplingParams(temperature=0.8, seed=3, max_new_tokens=30, ignore_eos=True),
    SamplingParams(temperature=0.8, seed=4, max_new_tokens=25, stop=("e", "tho", "9")),
    SamplingParams(temperature=0, max_new_tokens=25, stop=("a", "\ufffd")),
    SamplingParams(temperature=0, max_new_tokens=25, prompt_lookup=4),
    SamplingParams(temperature=0.9, seed=5, max_new_tokens=8, logprobs=3, stop_token_ids=(17, 90, 204)),
    SamplingParams(temperature=0, max_new_tokens=8, logprobs=0, prompt_logprobs=2, logit_bias=((9, 3.0),), min_tokens=3),
]
PROMPTS = [[7 + i, 8, 7 + i, 8] * (1 + i) for i in range(len(REQUESTS))]


@pytest.fixture(params=["memory", "sqlite", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "memory":
        yield "memory"
    elif request.param == "sqlite":
        yield f"sqlite:{tmp_path / 'cache.db'}"
    else:
        with redis_server() as (url, _):
            yield url


def test_answers_from_a_cache_are_the_computed_ones_whole_and_streamed(store: str) -> None:
    executor = FakeExecutor(ending_rule)
    with make_engine(FakeExecutor(ending_rule)) as engine:
        expected = [answer(result) for result in engine.generate(PROMPTS, REQUESTS)]
        pieces = [list(engine.stream(prompt, params).deltas()) for prompt, params in zip(PROMPTS, REQUESTS, strict=True)]
    assert {result.finish_reason for result in expected} == {"stop", "length"}
    with cached_engine(executor, store, timeout_s=5) as engine:
        computed = engine.generate(PROMPTS, REQUESTS)
        assert [answer(result) for result in computed] == expected and not any(result.cached for result in computed)
        assert stats_of(engine).stores == len(REQUESTS)
        steps = len(executor.steps)
        hits = engine.generate(PROMPTS, REQUESTS)
        assert [answer(result) for result in hits] == expected and all(result.cached for result in hits)
        for prompt, params, result, parts in zip(PROMPTS, REQUESTS, expected, pieces, strict=True):
            with engine.stream(prompt, params) as stream:
                assert list(stream.deltas()) == parts and answer(stream.result) == result and stream.result.cached
            timings = stream.result.timings
            assert 0 < timings.prefill_s <= timings.first_token_s < 5 and timings.decode_s >= 0
        assert len(executor.steps) == steps
        count = len(REQUESTS)
        assert counts(engine) == {"hits": 2 * count, "misses": count, "stores": count}


def test_several_answers_to_a_prompt_are_stored_each(store: str) -> None:
    params = SamplingParams(temperature=1.0, seed=3, n=3, max_new_tokens=6)
    with cached_engine(store=store, timeout_s=5) as engine:
        computed = engine.generate([PROMPT], params)
        assert len({tuple(result.token_ids) for result in computed}) == 3 and stats_of(engine).stores == 3
        hits = engine.generate([PROMPT], params)
        assert [answer(hit) for hit in hits] == [answer(result) for result in computed] and all(hit.cached for hit in hits)


def test_event_loops_get_answers_from_the_cache(store: str) -> None:
    async def main() -> None:
        with cached_engine(store=store, timeout_s=5) as engine:
            computed = await engine.agenerate(PROMPTS, REQUESTS)
            stats_of(engine)
            hits = await engine.agenerate(PROMPTS, REQUESTS)
            assert [answer(hit) for hit in hits] == [answer(result) for result in computed] and all(hit.cached for hit in hits)
            for prompt, params, result in zip(PROMPTS, REQUESTS, computed, strict=True):
                async with engine.astream(prompt, params) as stream:
                    assert "".join([piece async for piece in stream]) == result.text
                assert stream.result.cached and answer(stream.result) == answer(result)
                async with engine.astream(prompt, params, cache=CachePolicy(no_cache=True)) as stream:
                    assert "".join([piece async for piece in stream]) == result.text
                assert not stream.result.cached

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_streamed_answer_is_stored_too(store: str) -> None:
    with cached_engine(store=store, timeout_s=5) as engine:
        with engine.stream(PROMPT, SEEDED) as stream:
            pieces = list(stream)
        assert stats_of(engine).stores == 1
        (hit,) = engine.generate([PROMPT], SEEDED)
        assert hit.cached and hit.text == "".join(pieces) and answer(hit) == answer(stream.result)


def test_a_file_outlives_its_engine_and_serves_no_other(tmp_path: Path) -> None:
    store = f"sqlite:{tmp_path / 'cache.db'}"
    with cached_engine(store=store, digest="a") as engine:
        (computed,) = engine.generate([PROMPT], GREEDY)
    with cached_engine(store=store, digest="a") as engine:
        (hit,) = engine.generate([PROMPT], GREEDY)
        assert hit.cached and answer(hit) == answer(computed)
    with cached_engine(store=store, digest="b") as engine:
        assert not engine.generate([PROMPT], GREEDY)[0].cached


def test_requests_without_a_seed_are_computed() -> None:
    executor = FakeExecutor()
    with cached_engine(executor) as engine:
        for _ in range(2):
            assert not engine.generate([PROMPT], SamplingParams(temperature=1.0, max_new_tokens=4))[0].cached
        assert counts(engine) == {"bypassed": 2} and len(executor.steps) == 8


def test_sequences_beyond_the_length_where_rope_grows_are_cached() -> None:
    model = manifest().model
    model.dimensions["dynamic_rope_from"] = len(PROMPT) + 1
    with cached_engine(model=model) as engine:
        first, again = (engine.generate([PROMPT], GREEDY)[0] for _ in range(2))
        assert again.cached and again.token_ids == first.token_ids


def test_identical_prompts_of_one_call_are_computed_once() -> None:
    executor = FakeExecutor()
    with cached_engine(executor) as engine:
        results = engine.generate([PROMPT, [9], PROMPT, PROMPT], GREEDY)
        assert [result.cached for result in results] == [False, False, True, True]
        assert len({tuple(result.token_ids) for result in results}) == 2
        assert executor.steps[0][0] == len(PROMPT) + 1
        assert counts(engine) == {"shared": 2, "misses": 2, "stores": 2}


def test_no_cache_computes_and_replaces_what_is_stored() -> None:
    store, executor = MemoryStore(1 << 20), FakeExecutor()
    with cached_engine(executor, store) as engine:
        (first,) = engine.generate([PROMPT], GREEDY)
        key = engine.resolve(PROMPT, GREEDY).key(engine.identity)
        wrong = Entry((1,) * 10, "length")
        store.put(key, wrong.encode(key))
        assert engine.generate([PROMPT], GREEDY)[0].token_ids == [1] * 10
        (fresh,) = engine.generate([PROMPT], GREEDY, cache=NO_CACHE)
        assert not fresh.cached and answer(fresh) == answer(first) and len(executor.steps) == 20
        assert answer(engine.generate([PROMPT], GREEDY)[0]) == answer(first)
        store.put(key, wrong.encode(key))
        neither = CachePolicy(no_cache=True, no_store=True)
        list(engine.stream(PROMPT, GREEDY, cache=neither))
        assert engine.generate([PROMPT], GREEDY)[0].token_ids == [1] * 10


def test_no_store_reads_and_does_not_write() -> None:
    with cached_engine() as engine:
        for _ in range(2):
            assert not engine.generate([PROMPT], GREEDY, cache=NO_STORE)[0].cached
        engine.generate([PROMPT], GREEDY)
        assert engine.generate([PROMPT], GREEDY, cache=NO_STORE)[0].cached
        assert counts(engine) == {"misses": 3, "stores": 1, "hits": 1}


def test_failed_and_withdrawn_answers_are_not_stored() -> None:
    executor = GatedExecutor()
    with cached_engine(executor) as engine:
        stream = engine.stream(PROMPT, GREEDY)
        executor.allow(3)
        wait_for(lambda: len(executor.steps) == 3)
        stream.close()
        executor.allow_all()
        wait_for(lambda: engine._loop.idle)
        executor.failure = RuntimeError("kernel broke")
        with pytest.raises(RuntimeError, match="kernel broke"):
            engine.generate([PROMPT], SEEDED)
        assert counts(engine) == {"misses": 2}
        assert not engine.generate([PROMPT], GREEDY)[0].cached
        assert not engine.generate([PROMPT], SEEDED)[0].cached


def test_damaged_entries_are_misses_and_dropped(store: str) -> None:
    with cached_engine(store=store, timeout_s=5) as engine:
        (first,) = engine.generate([PROMPT], GREEDY)
        other = engine.resolve([9], GREEDY).key(engine.identity)
        key = engine.resolve(PROMPT, GREEDY).key(engine.identity)
        stats_of(engine)
        inner = cache_of(engine)._store
        good = inner.get(key) or b""
        short = Entry((1, 2), "length").encode(key)
        for bad in (b"", good[:-1], good[:10] + b"?" + good[11:], short, Entry((1,) * 10, "length").encode(other)):
            inner.put(key, bad)
            damaged = stats_of(engine).damaged
            (result,) = engine.generate([PROMPT], GREEDY)
            assert not result.cached and answer(result) == answer(first)
            assert stats_of(engine).damaged == damaged + 1 and inner.get(key) == good


def test_hits_of_a_zipf_trace_are_those_of_an_ideal_lru() -> None:
    capacity, two = 20, SamplingParams(temperature=0, max_new_tokens=2)
    entry_bytes = 64 + len(Entry((1, 2), "length").encode("")) + ENTRY_OVERHEAD
    trace = np.minimum(np.random.default_rng(7).zipf(1.2, 400), 200).tolist()
    ideal: OrderedDict[int, None] = OrderedDict()
    with cached_engine(store=MemoryStore(capacity * entry_bytes)) as engine:
        for number in trace:
            assert engine.generate([[number]], two)[0].cached == (number in ideal)
            ideal[number] = None
            ideal.move_to_end(number)
            if len(ideal) > capacity:
                ideal.popitem(last=False)
        stats = stats_of(engine)
    assert stats.hits / len(trace) > 0.35 and stats.hits + stats.misses == len(trace)
    assert stats.bytes == capacity * entry_bytes


class BrokenStore:
    """Fails at every call."""

    waits = True

    def __init__(self) -> None:
        self.counters = Counters()

    def get(self, key: str) -> bytes | None:
        raise OSError("the disk is gone")

    def put(self, key: str, value: bytes) -> None:
        raise OSError("the disk is gone")

    def delete(self, key: str) -> None:
        raise OSError("the disk is gone")

    def stored_bytes(self) -> int:
        return 0

    def close(self) -> None:
        raise OSError("the disk is gone")


def test_a_store_that_fails_fails_no_request(caplog: pytest.LogCaptureFixture) -> None:
    with cached_engine(store=BrokenStore()) as engine, make_engine() as plain:
        for _ in range(3):
            assert answer(engine.generate([PROMPT], GREEDY)[0]) == answer(plain.generate([PROMPT], GREEDY)[0])
            stats_of(engine)
        assert counts(engine) == {"misses": 3, "errors": 6}
    assert [record.getMessage() for record in caplog.records] == ["The result cache's store failed: OSError: the disk is gone"]


def test_a_mute_redis_costs_its_time_limit_once() -> None:
    pytest.importorskip("redis", reason="the extra redis is not installed")
    with mute_server() as url, cached_engine(store=url, timeout_s=0.3) as engine:
        start = time.perf_counter()
        results = engine.generate([[i] for i in range(10)] * 2, GREEDY)
        results += [result for i in range(10) for result in engine.generate([[i]], GREEDY)]
        assert len({tuple(result.token_ids) for result in results}) == 10
        assert 0.15 < time.perf_counter() - start < 2 * 0.3 + 1
        cache_of(engine).flush()
        # A lookup and a write of each of the ten. Answers whose write still waits may be given to identical requests.
        assert stats_of(engine).errors >= 20 and stats_of(engine).stores == 0


def test_a_slow_store_stops_neither_steps_nor_other_requests() -> None:
    class SlowStore(MemoryStore):
        waits = True

        def __init__(self) -> None:
            super().__init__(1 << 20)
            self.gate = threading.Event()

        def get(self, key: str) -> bytes | None:
            assert self.gate.wait(30)
            return super().get(key)

        def put(self, key: str, value: bytes) -> None:
            assert self.gate.wait(30)
            super().put(key, value)

    store = SlowStore()
    with cached_engine(store=store) as engine:
        waiting = threading.Thread(target=engine.generate, args=([PROMPT], GREEDY))
        waiting.start()
        wait_for(lambda: len(cache_of(engine)._flights._flights) == 1)
        (first,) = engine.generate([[9]], GREEDY, cache=NO_CACHE)  # its put waits, and steps go on
        (again,) = engine.generate([[9]], GREEDY, cache=NO_CACHE)
        unseeded = engine.generate([PROMPT], SamplingParams(temperature=1.0, max_new_tokens=2))
        assert answer(first) == answer(again) and len(unseeded[0].token_ids) == 2 and waiting.is_alive()
        store.gate.set()
        waiting.join()
        assert engine.generate([PROMPT], GREEDY)[0].cached


def test_a_slow_store_does_not_hold_up_an_event_loop() -> None:
    class SlowReader(MemoryStore):
        waits = True

        def __init__(self) -> None:
            super().__init__(1 << 20)
            self.gate = threading.Event()

        def get(self, key: str) -> bytes | None:
            assert self.gate.wait(30)
            return super().get(key)

    async def main(engine: Engine, store: SlowReader) -> None:
        streams = [engine.astream(PROMPT, GREEDY), engine.astream(PROMPT, GREEDY), engine.astream([9], GREEDY)]
        task = asyncio.create_task(engine.agenerate([PROMPT, [8]], GREEDY))
        await asyncio.sleep(0.01)
        streams[0].close()  # before it is looked up; the others go on
        streams[2].close()  # nobody wants this one any more
        store.gate.set()
        text = "".join([piece async for piece in streams[1]])
        assert text == (await task)[0].text
        for stream in (streams[0], streams[2]):
            with pytest.raises(EngineError, match="the request was withdrawn"):
                _ = [piece async for piece in stream]
        store.gate.clear()
        last = engine.astream([7], GREEDY)
        await asyncio.sleep(0)
        engine.close()
        store.gate.set()
        with pytest.raises(EngineError, match="the engine is closed"):
            _ = [piece async for piece in last]

    store, executor = SlowReader(), FakeExecutor()
    with cached_engine(executor, store) as engine:
        asyncio.run(asyncio.wait_for(main(engine, store), 60))
        assert engine.result_cache and engine.result_cache.stats().misses == 4
        assert len(executor.steps) <= 20, "one answer was given up before it was begun"


def test_an_answer_that_waits_to_be_stored_is_given_already() -> None:
    class SlowWriter(MemoryStore):
        waits = True

        def __init__(self) -> None:
            super().__init__(1 << 20)
            self.gate = threading.Event()

        def put(self, key: str, value: bytes) -> None:
            assert self.gate.wait(30)
            super().put(key, value)

    store, executor = SlowWriter(), FakeExecutor()
    with cached_engine(executor, store) as engine:
        (first,) = engine.generate([PROMPT], GREEDY)
        (second,) = engine.generate([PROMPT], GREEDY)
        with engine.stream(PROMPT, GREEDY) as stream:
            assert "".join(stream) == first.text
        assert second.cached and answer(second) == answer(first) and len(executor.steps) == 10
        store.gate.set()
        assert counts(engine) == {"misses": 1, "hits": 2, "stores": 1}


def test_a_forgotten_engine_stores_and_closes(tmp_path: Path) -> None:
    store = f"sqlite:{tmp_path / 'cache.db'}"
    executor = FakeExecutor()
    engine = cached_engine(executor, store)
    engine.generate([PROMPT], GREEDY)
    gone = weakref.ref(engine)
    del engine
    gc.collect()
    assert gone() is None and executor.closed
    assert not [thread for thread in threading.enumerate() if thread.name == "belle-result-cache"]
    with cached_engine(store=store) as engine:
        assert engine.generate([PROMPT], GREEDY)[0].cached


def test_a_closed_engine_refuses_cached_answers_too() -> None:
    engine = cached_engine()
    engine.close()
    for use in (lambda: engine.generate([PROMPT], GREEDY), lambda: engine.stream(PROMPT, GREEDY)):
        with pytest.raises(EngineError, match="the engine is closed; load it again"):
            use()


def test_an_engine_whose_cache_does_not_open_is_closed(tmp_path: Path) -> None:
    executor = FakeExecutor()
    with pytest.raises(EngineError, match="result cache: file"):
        cached_engine(executor, f"sqlite:{tmp_path}/none/cache.db")
    assert executor.closed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"store": "disk"}, "result cache: store: found 'disk', expected one of memory, sqlite:FILE, redis://HOST"),
        ({"store": "sqlite:"}, "store: found 'sqlite:', expected sqlite:FILE"),
        ({"max_bytes": 0}, "max_bytes: found 0, expected 1 or more"),
        ({"audit": 1.5}, r"audit: found 1\.5, expected a share from 0 to 1"),
        ({"ttl_s": 0}, "ttl_s: found 0, expected seconds, more than 0"),
        ({"timeout_s": float("inf")}, "timeout_s: found inf"),
    ],
)
def test_options_that_no_cache_can_have(options: dict[str, object], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        ResultCacheOptions(**options)  # type: ignore[arg-type]


def test_load_refuses_options_before_it_reads_the_engine(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="result cache: store: found 'disk'"):
        Engine.load(tmp_path, result_cache="disk")


class TestAudit:
    """A share of the hits is recomputed while the engine is idle."""

    def test_hits_are_recomputed_and_agree(self) -> None:
        executor = FakeExecutor()
        with cached_engine(executor, audit=1.0) as engine:
            for _ in range(3):
                engine.generate([PROMPT], SEEDED)
            wait_for(lambda: stats_of(engine).audits == 2)
            assert stats_of(engine).audit_differences == 0 and len(executor.steps) == 3 * 9
            assert engine.generate([PROMPT], SEEDED)[0].cached

    def test_a_difference_is_counted_logged_and_dropped(self, caplog: pytest.LogCaptureFixture) -> None:
        store = MemoryStore(1 << 20)
        with cached_engine(store=store, audit=1.0) as engine:
            key = engine.resolve(PROMPT, GREEDY).key(engine.identity)
            store.put(key, Entry((1,) * 10, "length").encode(key))
            with caplog.at_level(logging.WARNING):
                assert engine.generate([PROMPT], GREEDY)[0].token_ids == [1] * 10
                wait_for(lambda: store.get(key) is None)
            assert stats_of(engine).audit_differences == stats_of(engine).audits == 1
            (record,) = caplog.records
            assert record.levelname == "ERROR" and key in record.getMessage()
            assert engine.generate([PROMPT], GREEDY)[0].token_ids != [1] * 10

    def test_the_share_is_kept_and_repeats(self) -> None:
        chosen = []
        for _ in range(2):
            with cached_engine(audit=0.2) as engine:
                engine.generate([[i] for i in range(5)], GREEDY)
                for _ in range(20):
                    engine.generate([[i] for i in range(5)], GREEDY)
                wait_for(lambda: not cache_of(engine)._auditor.active)
                chosen.append(stats_of(engine).audits)
        assert chosen[0] == chosen[1] and 8 <= chosen[0] <= 35

    def test_it_makes_way_for_requests(self) -> None:
        executor = GatedExecutor()
        with cached_engine(executor, audit=1.0) as engine:
            executor.allow(10)
            engine.generate([PROMPT], GREEDY)
            engine.generate([PROMPT], GREEDY)
            wait_for(lambda: cache_of(engine)._auditor._running is not None)
            executor.allow(2)
            wait_for(lambda: len(executor.steps) == 12)
            other = threading.Thread(target=engine.generate, args=([[9]], GREEDY))
            other.start()
            wait_for(lambda: cache_of(engine)._auditor._running is None or not cache_of(engine)._flights._flights == {})
            executor.allow_all()
            other.join()
            wait_for(lambda: stats_of(engine).audits == 1)
            alone = [step for step in executor.steps if step == (1, 1)]
            assert len(alone) >= 9 + 9 + 9, "the audit and the request share at most the step under way"
            assert stats_of(engine).audit_differences == 0
