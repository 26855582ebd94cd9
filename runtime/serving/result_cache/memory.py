"""The default store of the result cache: in the memory of this process."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from belle_compile.runtime.serving.result_cache.store import Counters

ENTRY_OVERHEAD = 400  # bytes of the objects and of the table that hold an entry, beside its key and its value


class MemoryStore:
    """Entries in the order of their last use, at most `max_bytes`, each for at most `ttl_s` seconds (None: for good)."""

    waits = False

    def __init__(self, max_bytes: int, ttl_s: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` returns seconds."""
        self.counters = Counters()
        self._max_bytes, self._ttl_s, self._clock = max_bytes, ttl_s, clock
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, tuple[bytes, float]] = OrderedDict()  # value, and when it was put
        self._bytes = 0

    def get(self, key: str) -> bytes | None:
        """Return a value and make it the last one to be evicted."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            if self._ttl_s is not None and self._clock() - entry[1] >= self._ttl_s:
                self._remove(key)
                self.counters.add("expirations")
                return None
            self._entries.move_to_end(key)
            return entry[0]

    def put(self, key: str, value: bytes) -> None:
        """Set a value. One that is larger than the whole store is not kept."""
        with self._lock:
            self._remove(key)
            if _size(key, value) > self._max_bytes:
                return
            self._entries[key] = (value, self._clock())
            self._bytes += _size(key, value)
            while self._bytes > self._max_bytes:
                self._remove(next(iter(self._entries)))
                self.counters.add("evictions")

    def delete(self, key: str) -> None:
        """Remove a key, if it is there."""
        with self._lock:
            self._remove(key)

    def stored_bytes(self) -> int:
        """Bytes of keys, values and the objects that hold them."""
        return self._bytes

    def close(self) -> None:
        """Drop all entries."""
        with self._lock:
            self._entries.clear()
            self._bytes = 0

    def _remove(self, key: str) -> None:
        if entry := self._entries.pop(key, None):
            self._bytes -= _size(key, entry[0])


def _size(key: str, value: bytes) -> int:
    return len(key) + len(value) + ENTRY_OVERHEAD
