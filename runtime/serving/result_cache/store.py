"""What keeps the entries of a result cache, and what is counted about them."""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass, fields, replace
from typing import Protocol


@dataclass(frozen=True)
class CacheStats:
    """Counts since the cache was opened. `bytes` is what its store holds now, and 0 for one that does not know it (Redis).

    `hits` were answered from the store, `misses` were not in it, `shared` were answered by an identical request under way,
    `bypassed` were computed because no cache may answer them. `damaged` entries were dropped. `errors` are calls of the store
    that failed or were skipped. `audits` are hits that were recomputed, of which `audit_differences` had other tokens.
    """

    hits: int = 0
    misses: int = 0
    shared: int = 0
    bypassed: int = 0
    stores: int = 0
    evictions: int = 0
    expirations: int = 0
    damaged: int = 0
    errors: int = 0
    audits: int = 0
    audit_differences: int = 0
    bytes: int = 0

    def combine(self, later: CacheStats) -> CacheStats:
        """What this cache and a later one have counted together; the bytes are those of the later one."""
        counts = {name: getattr(self, name) + count for name, count in asdict(later).items() if name != "bytes"}
        return replace(later, **counts)


class Counters:
    """The counts of a `CacheStats`, by name, which several threads add to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = {field.name: 0 for field in fields(CacheStats) if field.name != "bytes"}

    def add(self, name: str, count: int = 1) -> int:
        """Add to the count of this name and return it."""
        with self._lock:
            self._counts[name] += count
            return self._counts[name]

    def stats(self, stored_bytes: int) -> CacheStats:
        """Return all counts."""
        with self._lock:
            return CacheStats(**self._counts, bytes=stored_bytes)


class Store(Protocol):
    """Maps keys to values for several threads. It counts evictions and expirations in `counters`.

    Whatever a method raises is counted as an error and fails no request.
    """

    counters: Counters
    waits: bool  # whether calls may wait for a disk or for a network; `put` and `delete` then come from one thread

    def get(self, key: str) -> bytes | None:
        """Return the value of a key; None if there is none."""
        ...

    def put(self, key: str, value: bytes) -> None:
        """Set the value of a key, and evict the values that were not used for longest where there is no room for it."""
        ...

    def delete(self, key: str) -> None:
        """Remove a key, if it is there."""
        ...

    def stored_bytes(self) -> int:
        """Bytes that the entries take; 0 if that is not known."""
        ...

    def close(self) -> None:
        """Release files and connections. The store is not used afterwards."""
        ...


class StoreUnavailable(Exception):
    """A store was not asked, because it did not answer shortly before."""
