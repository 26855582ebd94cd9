"""A circuit breaker: what failed just now is not tried again for a while."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class CircuitBreaker:
    """Refuses calls for `retry_after_s` seconds after one that failed, and then lets single calls try until one succeeds."""

    def __init__(self, retry_after_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` returns seconds."""
        self._retry_after_s, self._clock = retry_after_s, clock
        self._lock = threading.Lock()
        self._retry_at: float | None = None  # None while calls succeed

    def allow(self) -> bool:
        """Whether a call may be made. Its outcome must be told to `succeeded` or `failed`."""
        with self._lock:
            if self._retry_at is None:
                return True
            now = self._clock()
            if now < self._retry_at:
                return False
            self._retry_at = now + self._retry_after_s  # the other calls wait for the outcome of this one
            return True

    def succeeded(self) -> bool:
        """Allow calls again; returns whether they were refused before."""
        with self._lock:
            was_open, self._retry_at = self._retry_at is not None, None
            return was_open

    def failed(self) -> bool:
        """Refuse calls for a while; returns whether they were allowed before."""
        with self._lock:
            was_closed, self._retry_at = self._retry_at is None, self._clock() + self._retry_after_s
            return was_closed
