"""A store of the result cache that several hosts share: a Redis server, or one that speaks its protocol."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from belle_compile.runtime.errors import EngineError, install
from belle_compile.runtime.serving.result_cache.breaker import CircuitBreaker
from belle_compile.runtime.serving.result_cache.store import Counters, StoreUnavailable

T = TypeVar("T")

PREFIX = "belle-result:"
_CONNECTIONS = 4

_log = logging.getLogger(__name__)


class RedisStore:
    """Entries with an expiry on a Redis server, whose `maxmemory` and `maxmemory-policy allkeys-lru` bound them.

    A call takes at most `timeout_s` seconds, whatever the server, the network or the name service do: it runs on a thread that
    is not waited for longer. The server is then not asked for `retry_after_s` seconds.
    """

    waits = True

    def __init__(self, url: str, ttl_s: float | None, timeout_s: float, retry_after_s: float) -> None:
        """`url` is redis://, rediss:// (TLS) or unix://. Nothing is sent before the first call."""
        try:
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError:
            remedy = install("redis")
            raise EngineError("result cache", "the package redis is not installed", remedy=remedy) from None
        try:
            # RESP2 and no library name: a connection needs no answer before the first command, unless the URL has a password.
            self._client: Any = redis.Redis.from_url(
                url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, retry=Retry(NoBackoff(), 0), protocol=2,
                driver_info=None, max_connections=2 * _CONNECTIONS,
            )  # fmt: skip
        except ValueError as error:
            raise EngineError("result cache", "the URL of the Redis server", found=str(error)) from None
        self.counters = Counters()
        self._refusals: type[Exception] = redis.exceptions.ResponseError
        self._expiry = None if ttl_s is None else max(1, round(1000 * ttl_s))
        self._timeout_s = timeout_s
        self._breaker = CircuitBreaker(retry_after_s)
        self._threads = ThreadPoolExecutor(_CONNECTIONS, "belle-redis")

    def get(self, key: str) -> bytes | None:
        """Return a value; raises `StoreUnavailable` while the server is not asked."""
        value: bytes | None = self._call(lambda: self._client.get(PREFIX + key))
        return value

    def put(self, key: str, value: bytes) -> None:
        """Set a value; raises `StoreUnavailable` while the server is not asked."""
        self._call(lambda: self._client.set(PREFIX + key, value, px=self._expiry))

    def delete(self, key: str) -> None:
        """Remove a key; raises `StoreUnavailable` while the server is not asked."""
        self._call(lambda: self._client.delete(PREFIX + key))

    def stored_bytes(self) -> int:
        """Return 0: the server knows, and it is not asked for that."""
        return 0

    def close(self) -> None:
        """Close the connections. Calls that hang end by themselves, after their time limit."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._client.close()

    def _call(self, function: Callable[[], T]) -> T:
        if not self._breaker.allow():
            raise StoreUnavailable("the Redis server did not answer shortly before")
        try:
            value = self._threads.submit(function).result(self._timeout_s)
        except self._refusals:  # an answer, such as that the server's memory is full
            self._breaker.succeeded()
            raise
        except Exception as error:
            if self._breaker.failed():
                _log.warning("The result cache does without its Redis server for a while: %s", type(error).__name__)
            raise
        if self._breaker.succeeded():
            _log.warning("The result cache's Redis server answers again.")
        return value
