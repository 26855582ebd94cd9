"""Recomputes a share of the hits while the engine is idle, and compares."""

from __future__ import annotations

import hashlib
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.serving.generation import Generation
from belle_compile.runtime.serving.request import Request
from belle_compile.runtime.serving.result_cache.entry import Entry
from belle_compile.runtime.serving.result_cache.store import Counters
from belle_compile.runtime.serving.step_loop import StepLoop
from belle_compile.runtime.tokenizer import Tokenizer

MOST_WAITING = 64  # hits; while an engine is never idle, older ones are forgotten

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hit:
    """An answer that the cache gave."""

    key: str
    request: Request
    entry: Entry


class Auditor:
    """Recomputes hits in steps that nothing else needs, one at a time; `drop` removes the entry of one that differs.

    One thread calls `tick` again and again. A recomputation starts when the step loop is idle, and is put off when other
    requests come.
    """

    def __init__(
        self, share: float, loop: StepLoop, tokenizer: Tokenizer, counters: Counters, drop: Callable[[str], None]
    ) -> None:
        """`share` is that of the hits that are recomputed, from 0 to 1."""
        self._share, self._loop, self._tokenizer, self._counters, self._drop = share, loop, tokenizer, counters, drop
        self._waiting: deque[Hit] = deque(maxlen=MOST_WAITING)
        self._running: tuple[Hit, Generation] | None = None
        self._put_off = False

    @property
    def active(self) -> bool:
        """Whether `tick` has something to do."""
        return bool(self._waiting) or self._running is not None

    def offer(self, hit: Hit, number: int) -> bool:
        """Choose hits by a hash of key and number of the hit, so that a run can be repeated; returns whether it is chosen."""
        digest = hashlib.sha256(f"{hit.key} {number}".encode()).digest()
        chosen = int.from_bytes(digest[:8], "big") < self._share * 2**64
        if chosen:
            self._waiting.append(hit)
        return chosen

    def make_way(self) -> None:
        """Put the recomputation off: a request needs the steps."""
        if running := self._running:
            self._put_off = True
            self._loop.withdraw(running[1])

    def tick(self) -> None:
        """Start a recomputation if the engine is idle, or judge one that has ended."""
        if self._running is None:
            if self._waiting and self._loop.idle:
                hit = self._waiting.popleft()
                generation = Generation(hit.request, self._tokenizer)
                self._put_off, self._running = False, (hit, generation)
                try:
                    self._loop.submit([generation])
                except EngineError:  # the engine is being closed
                    self._running = None
                    self._waiting.clear()
        elif self._running[1].done.is_set():
            self._judge(*self._running)
            self._running = None

    def _judge(self, hit: Hit, generation: Generation) -> None:
        try:
            result = generation.result()
        except Exception as error:
            if self._put_off:
                self._waiting.appendleft(hit)
            else:
                self._counters.add("errors")
                _log.warning("A cached answer could not be recomputed (entry %s): %s", hit.key, error)
            return
        self._counters.add("audits")
        if Entry.of(generation, result.finish_reason) != hit.entry:
            self._counters.add("audit_differences")
            _log.error("A cached answer differs from the one computed now (entry %s). The entry is dropped.", hit.key)
            self._drop(hit.key)
