"""Requests that are about to be submitted: an idle engine waits for them a moment, and their prompts share its first step."""

from __future__ import annotations

import threading


class Arrivals:
    """Counts the requests that have arrived and were not submitted or refused yet. Any thread may use it.

    Requests that arrive together are made ready one after the other. Without it, the first one of them would have the next step
    to itself, the others would be made ready beside its kernels, and all of them would wait for the end of that step.
    """

    def __init__(self, step_tokens: int) -> None:
        """Prompts of `step_tokens` tokens fill a step, which need not wait for more."""
        self._lock = threading.Lock()
        self._step_tokens = step_tokens
        self._count = self._tokens = 0
        self._settled = threading.Event()  # set while no request is announced, and once a step is filled
        self._settled.set()

    @property
    def announced(self) -> int:
        """The number of requests that are announced now."""
        return self._count

    def begin(self) -> None:
        """Announce a request that will be submitted soon. What takes long must not be announced: others wait for it."""
        with self._lock:
            self._count += 1
            if self._tokens < self._step_tokens:
                self._settled.clear()

    def end(self) -> None:
        """Take back one announcement."""
        with self._lock:
            self._count -= 1
            if not self._count:
                self._settled.set()

    def submitted(self, tokens: int) -> None:
        """Take notice of so many tokens of prompts that were submitted."""
        with self._lock:
            self._tokens += tokens
            if self._tokens >= self._step_tokens:
                self._settled.set()

    def wait(self, seconds: float) -> None:
        """Wait until no request is announced or a step is filled, for so many seconds at most."""
        self._settled.wait(seconds)

    def taken(self) -> None:
        """Take notice that a step begins with the prompts that were submitted."""
        with self._lock:
            self._tokens = 0
            if self._count:
                self._settled.clear()
