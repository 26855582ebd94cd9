"""Requests that are about to be submitted: an idle engine waits for them a moment, and their prompts share its first step."""

from __future__ import annotations

import threading


class Arrivals:
    """Counts the requests that have arrived and were not submitted or refused yet. Any thread may use it.

    Requests that arrive together are made ready one after the other. Without it, the first one of them would have the next step
    to itself, the others would be made ready beside its kernels, and all of them would wait for the end of that step.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._none = threading.Event()  # set while there is none
        self._none.set()

    @property
    def announced(self) -> int:
        """The number of requests that are announced now."""
        return self._count

    def begin(self) -> None:
        """Announce a request that will be submitted soon. What takes long must not be announced: others wait for it."""
        with self._lock:
            self._count += 1
            self._none.clear()

    def end(self) -> None:
        """Take back one announcement."""
        with self._lock:
            self._count -= 1
            if not self._count:
                self._none.set()

    def wait(self, seconds: float) -> None:
        """Wait until no request is announced, for so many seconds at most."""
        self._none.wait(seconds)
