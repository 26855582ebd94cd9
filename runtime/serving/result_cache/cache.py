"""The result cache of an engine, in front of its step loop.

A request is answered from the cache only if its answer depends on the request alone: it is greedy or has a seed. Its key
(`Request.key`) covers every field of the request and what computes it, so two requests with the same key have the same answer,
bit for bit.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.serving.generation import FinishReason, Generation
from belle_compile.runtime.serving.messages import Job
from belle_compile.runtime.serving.request import EngineIdentity, Request
from belle_compile.runtime.serving.result_cache.audit import Auditor, Hit
from belle_compile.runtime.serving.result_cache.background import Background
from belle_compile.runtime.serving.result_cache.entry import DamagedEntry, Entry
from belle_compile.runtime.serving.result_cache.options import CachePolicy, ResultCacheOptions
from belle_compile.runtime.serving.result_cache.single_flight import Flight, Flights
from belle_compile.runtime.serving.result_cache.store import CacheStats, StoreUnavailable
from belle_compile.runtime.serving.step_loop import StepLoop
from belle_compile.runtime.tokenizer import Tokenizer

_T = TypeVar("_T")

_DEFAULT = CachePolicy()
_READERS = 4  # threads, which start with the first request that cannot wait itself
_CLOSE_S = 10.0  # how long closing waits for answers to be stored
_LOG_EVERY_S = 60.0

_log = logging.getLogger(__name__)


def depends_on_request_alone(request: Request) -> bool:
    """Whether a request is greedy or has a seed, so that it has one answer."""
    return request.greedy or request.seed is not None


class ResultCache:
    """Submits requests to a step loop, but for those that it answers itself: from its store, or with another request's tokens.

    Stores that wait for a disk or a network are read on the thread of the caller of `submit`, or on a thread of the cache for
    callers that cannot wait, written by another thread of the cache, and never called under a lock.
    """

    def __init__(
        self,
        options: ResultCacheOptions,
        loop: StepLoop,
        tokenizer: Tokenizer,
        identity: EngineIdentity,
        after_answers: Callable[[], None] = lambda: None,
    ) -> None:
        """Open the store; raises `EngineError` where that is not possible.

        `after_answers` is called, on any thread, after requests were answered on that thread.
        """
        self._store = options.open_store()
        self._counters = self._store.counters
        self._loop, self._identity = loop, identity
        self._flights = Flights(loop, self._complete)
        self._auditor = Auditor(options.audit, loop, tokenizer, self._counters, self._drop_now)
        self._background = Background(self._auditor)
        self._readers = ThreadPoolExecutor(_READERS, "belle-cache-reader")
        self._after_answers = after_answers
        self._logged_at = -_LOG_EVERY_S

    def submit(self, generations: Sequence[Generation], policy: CachePolicy = _DEFAULT, *, wait: bool = True) -> None:
        """Answer what the cache can, and submit the others, all before the next step.

        Without `wait`, what may be in a file or on a server is looked up on another thread, and submitted after that. Raises
        `EngineError` when the step loop is stopped.
        """
        led: list[tuple[str, Generation]] = []
        now = generations
        try:
            for generation in generations:
                self._enter(generation, policy, led)
            if led and self._store.waits and not wait:
                self._readers.submit(self._look_up, led)
                later = {generation for _, generation in led}
                now = [generation for generation in generations if generation not in later]
            else:
                for key, generation in led:
                    self._answer(key, generation)
        finally:  # also when interrupted: followers count on those that lead
            self._compute(now)

    def withdraw(self, job: Job) -> None:
        """Drop a request, unless others wait for its answer. Takes no lock: the garbage collector may call it anywhere."""
        self._flights.withdraw(job)

    def stats(self) -> CacheStats:
        """Return what was counted since the cache was opened."""
        return self._counters.stats(self._guarded(self._store.stored_bytes) or 0)

    def flush(self) -> None:
        """Wait until the answers that have ended are stored."""
        self._background.flush()

    def close(self) -> None:
        """Store what has ended, and close the store. The step loop must be stopped before."""
        self._readers.shutdown(wait=False)  # what is looked up now is refused by the step loop
        self._background.close(_CLOSE_S)
        self._guarded(self._store.close)

    def _enter(self, generation: Generation, policy: CachePolicy, led: list[tuple[str, Generation]]) -> None:
        """Let a request join one under way, or add it to those that are looked up."""
        request = generation.request
        if not depends_on_request_alone(request):
            self._counters.add("bypassed")
            return
        key = request.key(self._identity)
        if policy.no_cache:
            self._counters.add("bypassed")
            self._flights.lead_alone(key, generation, not policy.no_store)
        elif flight := self._flights.enter(key, generation, not policy.no_store):
            self._counters.add("hits" if flight.ended else "shared")
            if generation.sequence.deadline < math.inf and not generation.done.is_set():
                self._loop.watch(generation)
        else:
            led.append((key, generation))

    def _look_up(self, led: list[tuple[str, Generation]]) -> None:
        """Answer or submit requests, on a thread of the cache."""
        try:
            for key, generation in led:
                self._answer(key, generation)
        finally:
            self._compute([generation for _, generation in led])

    def _answer(self, key: str, generation: Generation) -> None:
        """Give the answer of a key if the store has it."""
        entry = self._read(key, generation.request)
        if entry is None:
            self._counters.add("misses")
            return
        generation.cached = True
        generation.start()
        try:
            entry.replay(generation)
            if not generation.done.is_set():
                raise EngineError("result cache", "an entry ends before its answer", remedy="repeat the request")
        except BaseException as error:  # such as an interrupt: half an answer cannot be computed to its end
            self._drop(key)
            generation.fail(error)
            if not isinstance(error, Exception):
                raise
            return
        number = self._counters.add("hits")
        if self._auditor.offer(Hit(key, generation.request, entry), number):
            self._background.put(lambda: None)  # wakes the thread up

    def _compute(self, generations: Sequence[Generation]) -> None:
        """Submit the requests that are not answered."""
        if not all(generation.cached for generation in generations):
            self._auditor.make_way()
        try:
            self._flights.submit(generations)
        except BaseException as error:
            for generation in generations:
                if not generation.done.is_set():
                    generation.fail(error)
            raise
        finally:
            self._after_answers()

    def _read(self, key: str, request: Request) -> Entry | None:
        data = self._guarded(partial(self._store.get, key))
        if data is None:
            return None
        try:
            entry = Entry.decode(key, data)
            if entry.fits(request):
                return entry
        except DamagedEntry:
            pass
        self._counters.add("damaged")
        self._drop(key)
        return None

    def _complete(self, flight: Flight, finish_reason: FinishReason) -> None:
        """Store the answer of a flight, here or on the cache's thread. Called on the thread that ended it."""
        if not flight.storable or flight.leader.cached:
            self._flights.release(flight)
            return
        entry = Entry.of(flight.leader, finish_reason)
        task = partial(self._write, flight, entry)
        scored = entry.logprobs is not None or entry.prompt_logprobs is not None  # which take a millisecond to encode
        if not self._store.waits and not scored:
            task()
            return
        queued = False
        try:
            queued = self._background.put(task)
        finally:
            if not queued:
                self._counters.add("errors")
                self._flights.release(flight)

    def _write(self, flight: Flight, entry: Entry) -> None:
        def put() -> bool:
            self._store.put(flight.key, entry.encode(flight.key))
            return True

        if self._guarded(put):
            self._counters.add("stores")
        self._flights.release(flight)

    def _drop(self, key: str) -> None:
        """Remove an entry, on the cache's thread if that may wait."""
        if self._store.waits:
            self._background.put(partial(self._drop_now, key))
        else:
            self._drop_now(key)

    def _drop_now(self, key: str) -> None:
        self._guarded(partial(self._store.delete, key))

    def _guarded(self, call: Callable[[], _T]) -> _T | None:
        """Return what a call of the store returns; None, and one more error, where it fails."""
        try:
            return call()
        except Exception as error:
            self._counters.add("errors")
            now = time.monotonic()
            if not isinstance(error, StoreUnavailable) and now - self._logged_at >= _LOG_EVERY_S:
                self._logged_at = now
                _log.warning("The result cache's store failed: %s: %s", type(error).__name__, error)
            return None
