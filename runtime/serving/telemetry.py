"""What an engine counts (`EngineStats`), and what it reports to whoever observes it (`Telemetry`)."""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, get_args

from belle_compile.runtime.serving.result_cache.store import CacheStats

End = Literal["stop", "length", "cancelled", "deadline", "error"]  # how a request ended


@dataclass(frozen=True)
class AdapterStats:
    """Room for `slots` adapters, and the names of those that `running` and `waiting` sequences use."""

    slots: int
    running: tuple[str, ...]
    waiting: tuple[str, ...]

    def combine(self, later: AdapterStats) -> AdapterStats:
        """The names of two engines of a server, each once, and the room of the later one."""
        running, waiting = dict.fromkeys(self.running + later.running), dict.fromkeys(self.waiting + later.waiting)
        return AdapterStats(later.slots, tuple(running), tuple(waiting))


@dataclass(frozen=True)
class EngineStats:
    """The state of an engine and what it has counted since it was loaded.

    `running` sequences have a row of the block table. `waiting` have none: they have not begun, were preempted, or wait for a
    prefix that another one computes. `preemptions` counts the times that a running sequence gave up its blocks to another one,
    and `recomputed_tokens` the tokens that were computed again for it. `refusals` are requests that found the queue full.

    Of `kv_blocks` blocks, `kv_blocks_used` are referenced by running sequences, and `kv_blocks_cached` are kept for later
    prompts without being used; `evictions` of those made room for others. `prefix_hits` of the `prefix_queries` tokens of the
    prompts that began came from the prefix cache. `prompt_tokens` are the tokens of prompts that steps computed, those again
    included, and `generated_tokens` are those that steps added to answers. `drafted_tokens` were guessed by prompt
    lookup or a draft model, and of them `accepted_tokens` were right.

    `requests` counts the requests that have ended. `last_step_at` is the time on `time.monotonic()` at which the last step
    ended; None before the first. `result_cache` is None without one, and `adapters` without room for some.
    """

    running: int
    waiting: int
    preemptions: int
    recomputed_tokens: int
    refusals: int
    kv_blocks: int
    kv_blocks_used: int
    kv_blocks_cached: int
    evictions: int
    prefix_hits: int
    prefix_queries: int
    prompt_tokens: int
    generated_tokens: int
    steps: int
    requests: Mapping[End, int]
    last_step_at: float | None
    result_cache: CacheStats | None
    adapters: AdapterStats | None = None
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def cancellations(self) -> int:
        """Requests that their callers gave up."""
        return self.requests["cancelled"]

    @property
    def deadlines_missed(self) -> int:
        """Requests whose time was over before their last token."""
        return self.requests["deadline"]


def combine(before: EngineStats | None, stats: EngineStats) -> EngineStats:
    """What two engines of a server have counted together. What there is at one moment of blocks and stored bytes is that of
    `stats`, the later one."""
    if before is None:
        return stats
    counts = {name: getattr(before, name) + getattr(stats, name) for name in _SUMS}
    requests = {end: before.requests[end] + count for end, count in stats.requests.items()}
    results = stats.result_cache or before.result_cache
    if before.result_cache and stats.result_cache:
        results = before.result_cache.combine(stats.result_cache)
    adapters = stats.adapters or before.adapters
    if before.adapters and stats.adapters:
        adapters = before.adapters.combine(stats.adapters)
    return replace(stats, requests=requests, result_cache=results, adapters=adapters, **counts)


# The fields of `EngineStats` that count, or are at one moment parts of what all engines of a server do.
_SUMS = (
    "running", "waiting", "preemptions", "recomputed_tokens", "refusals", "evictions", "prefix_hits", "prefix_queries",
    "prompt_tokens", "generated_tokens", "steps", "drafted_tokens", "accepted_tokens",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class StepRecord:
    """A step: its wall time in seconds with scheduling and sampling, its tokens, those of them that belong to prompts or are
    computed again, its rows of logits, the sequences that run and wait after it, and for each answer that got its next token in
    it, or since the step before, the seconds since the token before that."""

    seconds: float
    tokens: int
    prompt_tokens: int
    rows: int
    running: int
    waiting: int
    token_gaps: Sequence[float]


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """A request that has ended.

    `queue_s` runs from its arrival to its first step, `prefill_s` from there to its first token, `first_token_s` from its
    arrival to its first token, `decode_s` from its first token to its last, and `total_s` from its arrival to its end. What did
    not happen takes 0 seconds. `cached_tokens` of its prompt came from the prefix cache. A `cached` answer came from the result
    cache or from an identical request. `adapter` is the digest of the adapter that it was computed with; "" for none.
    """

    queue_s: float
    prefill_s: float
    first_token_s: float
    decode_s: float
    total_s: float
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    end: End
    preemptions: int
    cached: bool
    adapter: str = ""


class Telemetry(Protocol):
    """Observes an engine. Its methods delay the steps, so they return at once; they must not raise."""

    def step(self, record: StepRecord) -> None:
        """A step was run. Called on the step thread."""
        ...

    def ended(self, record: RequestRecord) -> None:
        """A request has ended, whatever its end. Called once a request, one call at a time: on the step thread, or on a thread
        that submitted requests."""
        ...


class RequestLog:
    """Counts requests by their end, and passes their records on.

    `add` takes no lock, because the garbage collector may end a request anywhere; `flush` counts what was added.
    """

    def __init__(self, telemetry: Telemetry | None) -> None:
        self._telemetry = telemetry
        self._added: queue.SimpleQueue[RequestRecord] = queue.SimpleQueue()
        self._lock = threading.RLock()  # reentrant: whoever observes may ask for the engine's counts
        self._ends: Counter[End] = Counter({end: 0 for end in get_args(End)})

    def add(self, record: RequestRecord) -> None:
        """Take the record of a request that has ended."""
        self._added.put(record)

    def flush(self) -> None:
        """Count the records that were added, and pass them on."""
        if self._added.empty():
            return
        with self._lock:
            while not self._added.empty():
                record = self._added.get()
                self._ends[record.end] += 1
                if self._telemetry:
                    self._telemetry.ended(record)

    def ends(self) -> dict[End, int]:
        """The number of requests by their end."""
        self.flush()
        with self._lock:
            return dict(self._ends)
