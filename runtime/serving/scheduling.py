"""When a request is served: what a caller may ask for, and the errors of requests for which there is no room or no time."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from belle_compile.runtime.errors import EngineError

LARGEST_PRIORITY = 2**31 - 1
LONGEST_CLIENT = 256  # characters
RETRY_AFTER_S = 1.0  # advice of a full queue while no speed is known
_RECENT = 64  # admissions that the speed of a queue is measured over


@dataclass(frozen=True)
class Scheduling:
    """When a request is served. It changes no answer, and is no part of `Request`.

    Requests of a lower `priority` number come first, as in vLLM. Among those of one priority, the `client` (an API key's name)
    that was served the fewest tokens so far comes first, then the request that arrived first. A request that has not got its
    last token `timeout_s` seconds after its arrival ends with `DeadlineExceeded`; None is no limit.
    """

    priority: int = 0
    timeout_s: float | None = None
    client: str = ""

    def __post_init__(self) -> None:
        """Raise `EngineError` for a value of another type or outside of its range."""
        if type(self.priority) is not int or abs(self.priority) > LARGEST_PRIORITY:
            raise _refusal("priority", self.priority, f"a whole number, {-LARGEST_PRIORITY} to {LARGEST_PRIORITY}")
        if self.timeout_s is not None and (type(self.timeout_s) not in (int, float) or not 0 < self.timeout_s < math.inf):
            raise _refusal("timeout_s", self.timeout_s, "seconds, more than 0")
        if not isinstance(self.client, str) or len(self.client) > LONGEST_CLIENT:
            raise _refusal("client", self.client, f"a name of at most {LONGEST_CLIENT} characters")

    def deadline(self, arrived: float) -> float:
        """The time on the clock of `arrived` at which the request must have ended; infinity without a limit."""
        return math.inf if self.timeout_s is None else arrived + self.timeout_s


@dataclass(frozen=True)
class FirstTokenLimit:
    """How long a request may wait for its first token, by what was measured on the host: it is refused at once where it would
    wait longer than `seconds`. Prompts are computed at `prompt_tokens_per_s`; while no request has been admitted from a queue
    yet, one leaves it every `gap_s` seconds."""

    seconds: float
    prompt_tokens_per_s: float
    gap_s: float


@dataclass(frozen=True)
class SchedulerOptions:
    """The options of an engine's scheduler.

    At most `max_num_seqs` sequences run at the same time; None is as many as the engine was built for. At most `max_queue`
    requests wait for their first step; None is any number. `prefix_cache` keeps the blocks of the KV cache that answers have
    filled, for later prompts that begin alike. With `first_token`, a request whose first token would come later is refused.
    """

    max_num_seqs: int | None = None
    max_queue: int | None = None
    prefix_cache: bool = True
    first_token: FirstTokenLimit | None = None

    def __post_init__(self) -> None:
        """Raise `EngineError` for a value of another type or outside of its range."""
        for name, least in (("max_num_seqs", 1), ("max_queue", 0)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least):
                raise EngineError("engine", name, found=_shown(value), expected=f"a whole number, {least} or more")
        if type(self.prefix_cache) is not bool:
            raise EngineError("engine", "prefix_cache", found=_shown(self.prefix_cache), expected="True or False")


class QueueFull(EngineError):
    """A request was refused because the queue is full, or because it would wait there beyond its deadline or the server's
    limit.

    `retry_after_s` is when there should be room, predicted from the speed at which requests were admitted recently; None for
    requests submitted together that are too many even for an empty queue.
    """

    def __init__(self, what: str, *, found: str, expected: str, retry_after_s: float | None) -> None:
        remedy = "submit fewer at once" if retry_after_s is None else f"try again in {math.ceil(retry_after_s)} s"
        super().__init__("request", what, found=found, expected=expected, remedy=remedy)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(EngineError):
    """A request ended because its time was over."""

    def __init__(self) -> None:
        super().__init__("request", "the request's time was over before its answer was complete", remedy="allow it more time")


class Withdrawn(EngineError):
    """A request ended because its caller gave it up."""

    def __init__(self) -> None:
        super().__init__("request", "the request was withdrawn")


class Pace:
    """The speed at which requests leave a queue: the mean time between the last few that did while others waited behind them.

    `left` is called on the step thread, `wait_s` on any.
    """

    def __init__(self) -> None:
        self._gaps: deque[float] = deque(maxlen=_RECENT)
        self._mean: float | None = None
        self._last: float | None = None  # when requests were admitted last; None if none have waited since

    def left(self, count: int, now: float, waiting: int) -> None:
        """Take notice that `count` requests were admitted at the time `now`, and that `waiting` are left."""
        if count and self._last is not None:
            self._gaps.append((now - self._last) / count)
            self._mean = sum(self._gaps) / len(self._gaps)
        if not waiting:
            self._last = None
        elif count:
            self._last = now

    def wait_s(self, ahead: int) -> float | None:
        """Seconds until the request behind `ahead` others is admitted; None while nothing is known."""
        mean = self._mean
        return None if mean is None else mean * (ahead + 1)


def _refusal(name: str, value: object, expected: str) -> EngineError:
    return EngineError("scheduling", name, found=_shown(value), expected=expected)


def _shown(value: object) -> str:
    return f"{str(value)[:80]!r} ({type(value).__name__})"
