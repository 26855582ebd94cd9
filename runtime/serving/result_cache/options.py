"""How a result cache is set up, and how a request may use it."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.serving.result_cache.memory import MemoryStore
from belle_compile.runtime.serving.result_cache.store import Store

SQLITE = "sqlite:"
_REDIS = ("redis://", "rediss://", "unix://")
_STORES = "memory, sqlite:FILE, redis://HOST:PORT/DB, rediss://… or unix://…"


@dataclass(frozen=True)
class CachePolicy:
    """What a request allows the result cache to do; it is not part of the request's key.

    With `no_cache` the answer is computed, whatever the cache has, and replaces what it has. With `no_store` the answer is not
    stored on behalf of this request.
    """

    no_cache: bool = False
    no_store: bool = False


@dataclass(frozen=True)
class ResultCacheOptions:
    """A result cache: where it stores entries, how many bytes of them and for how many seconds (None: until they are evicted).

    `store` is "memory", "sqlite:FILE", the URL of a Redis server (redis://, rediss://, unix://), or an object with the methods
    of `Store`. Redis bounds its memory itself, by its setting `maxmemory`; a call of it takes at most `timeout_s`, and after
    one that failed it is not asked for `retry_after_s`. The share `audit` of the hits is recomputed in idle steps.
    """

    store: str | Store = "memory"
    max_bytes: int = 256 << 20
    ttl_s: float | None = None
    audit: float = 0.0
    timeout_s: float = 0.1
    retry_after_s: float = 10.0

    def __post_init__(self) -> None:
        """Raise `EngineError` for a value that no cache can have."""
        if isinstance(self.store, str) and not self.store.startswith((*_REDIS, SQLITE)) and self.store != "memory":
            raise _refusal("store", repr(self.store), f"one of {_STORES}")
        if self.store == SQLITE:
            raise _refusal("store", repr(self.store), "sqlite:FILE, such as sqlite:/var/cache/belle.db")
        if type(self.max_bytes) is not int or self.max_bytes < 1:
            raise _refusal("max_bytes", str(self.max_bytes), "1 or more")
        if not _is_number(self.audit) or not 0 <= self.audit <= 1:
            raise _refusal("audit", str(self.audit), "a share from 0 to 1")
        for name in ("ttl_s", "timeout_s", "retry_after_s"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0 < value < float("inf")):
                raise _refusal(name, str(value), "seconds, more than 0")

    @classmethod
    def of(cls, value: ResultCacheOptions | str | None) -> ResultCacheOptions | None:
        """The options that a store's name stands for; options and None are returned as they are."""
        return cls(value) if isinstance(value, str) else value

    def open_store(self) -> Store:
        """Open the store; raises `EngineError` where that is not possible. A Redis server is not asked yet."""
        if not isinstance(self.store, str):
            return self.store
        if self.store == "memory":
            return MemoryStore(self.max_bytes, self.ttl_s)
        if self.store.startswith(SQLITE):
            from belle_compile.runtime.serving.result_cache.sqlite import SqliteStore

            return SqliteStore(Path(self.store.removeprefix(SQLITE)), self.max_bytes, self.ttl_s)
        from belle_compile.runtime.serving.result_cache.redis import RedisStore

        return RedisStore(self.store, self.ttl_s, self.timeout_s, self.retry_after_s)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _refusal(name: str, found: str, expected: str) -> EngineError:
    return EngineError("result cache", name, found=found, expected=expected)
