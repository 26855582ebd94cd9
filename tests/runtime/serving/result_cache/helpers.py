"""Engines with result caches over fake models, some of which wait before each step."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from belle_compile.runtime.engine import Engine, Result, Timings
from belle_compile.runtime.executors import StepBatch
from belle_compile.runtime.serving.request import SamplingParams
from belle_compile.runtime.serving.result_cache.cache import ResultCache
from belle_compile.runtime.serving.result_cache.memory import MemoryStore
from belle_compile.runtime.serving.result_cache.options import ResultCacheOptions
from belle_compile.runtime.serving.result_cache.store import CacheStats, Store
from tests.runtime.fakes import FakeExecutor, make_engine

GREEDY = SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=10)
SEEDED = SamplingParams(temperature=1.0, top_k=0, top_p=0.9, seed=11, max_new_tokens=9)


class GatedExecutor(FakeExecutor):
    """Runs as many steps as it is allowed to."""

    def __init__(self, **limits: int) -> None:
        super().__init__(**limits)  # type: ignore[arg-type]
        self.allowed = threading.Semaphore(0)
        self.open = False

    def allow(self, steps: int) -> None:
        for _ in range(steps):
            self.allowed.release()

    def allow_all(self) -> None:
        self.open = True
        self.allowed.release()

    def step(self, batch: StepBatch) -> np.ndarray:
        if not self.open:
            assert self.allowed.acquire(timeout=30), "no step is allowed"
        return super().step(batch)


def cached_engine(executor: FakeExecutor | None = None, store: Store | str | None = None, **options: Any) -> Engine:
    """An engine with a result cache, by default in memory. Options that are no cache's are the manifest's."""
    names = {field.name for field in dataclasses.fields(ResultCacheOptions)}
    of_cache = {name: options.pop(name) for name in list(options) if name in names}
    return make_engine(executor, ResultCacheOptions(MemoryStore(1 << 20) if store is None else store, **of_cache), **options)


def cache_of(engine: Engine) -> ResultCache:
    assert engine.result_cache is not None
    return engine.result_cache


def stats_of(engine: Engine) -> CacheStats:
    """The counts once what has ended is stored."""
    cache_of(engine).flush()
    return cache_of(engine).stats()


def counts(engine: Engine) -> dict[str, int]:
    """The counts that are not 0, without bytes."""
    return {name: count for name, count in dataclasses.asdict(stats_of(engine)).items() if count and name != "bytes"}


def answer(result: Result) -> Result:
    """A result without what was measured while it was computed."""
    return dataclasses.replace(result, timings=Timings(0, 0, 0, 0), drafted=0, accepted=0)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it does not come to pass"
        time.sleep(0.002)
