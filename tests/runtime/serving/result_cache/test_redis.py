"""The store on a Redis server: a real one, a dead one and a slow one."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time

import pytest

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.serving.result_cache.breaker import CircuitBreaker
from belle_compile.runtime.serving.result_cache.redis import RedisStore
from belle_compile.runtime.serving.result_cache.store import StoreUnavailable
from tests.runtime.serving.result_cache.servers import free_port, mute_server, redis_server

LIMIT_S = 0.2


def opened(url: str, ttl_s: float | None = None, retry_after_s: float = 60.0, timeout_s: float = LIMIT_S) -> RedisStore:
    pytest.importorskip("redis", reason="the extra redis is not installed")
    return RedisStore(url, ttl_s, timeout_s, retry_after_s)


def test_stores_share_a_server_and_entries_expire() -> None:
    with redis_server() as (url, _):
        first, second = opened(url, timeout_s=5), opened(url, ttl_s=0.2, timeout_s=5)
        assert first.get("a") is None
        first.put("a", b"\0one")
        assert second.get("a") == b"\0one"
        second.put("b", b"two")
        assert first.get("b") == b"two"
        time.sleep(0.3)
        assert first.get("b") is None and first.get("a") == b"\0one"
        second.delete("a")
        assert first.get("a") is None and first.stored_bytes() == 0
        first.close()
        second.close()


def refuses_fast(store: RedisStore) -> bool:
    """Whether calls are refused without asking the server."""
    start = time.perf_counter()
    for _ in range(100):
        with pytest.raises(StoreUnavailable):
            store.get("k")
        with pytest.raises(StoreUnavailable):
            store.put("k", b"v")
    return time.perf_counter() - start < LIMIT_S


def test_a_dead_server_costs_one_call() -> None:
    store = opened(f"redis://127.0.0.1:{free_port()}/0")
    start = time.perf_counter()
    with pytest.raises(Exception, match="refused"):
        store.get("k")
    assert time.perf_counter() - start < LIMIT_S + 0.5
    assert refuses_fast(store)
    store.close()


def test_a_server_that_never_answers_costs_its_time_limit_once() -> None:
    with mute_server() as url:
        store = opened(url)
        start = time.perf_counter()
        with pytest.raises(Exception):  # noqa: B017  (of the client, or of the wait for it, whichever ends first)
            store.get("k")
        assert 0.5 * LIMIT_S < time.perf_counter() - start < LIMIT_S + 0.5
        assert refuses_fast(store)
        store.close()


def test_a_server_that_drips_costs_its_time_limit_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        store = opened(f"redis://127.0.0.1:{listener.getsockname()[1]}/0")

        def drip() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(100)
                for byte in b"$5\r\nhello\r\n":
                    time.sleep(0.6 * LIMIT_S)
                    connection.sendall(bytes([byte]))

        thread = threading.Thread(target=drip)
        thread.start()
        start = time.perf_counter()
        with pytest.raises(Exception):  # noqa: B017
            store.get("k")
        assert time.perf_counter() - start < LIMIT_S + 0.5
        thread.join()
        store.close()


def test_a_server_that_comes_back_is_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    store = opened(f"redis://127.0.0.1:{port}/0", retry_after_s=0.3)
    with pytest.raises(Exception, match="refused"):
        store.put("k", b"v")
    with redis_server(port) as (_, pid):
        time.sleep(0.3)
        store.put("k", b"v")
        assert store.get("k") == b"v"
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(Exception):  # noqa: B017
            store.get("k")
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.4)
        assert store.get("k") == b"v"
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 4 and "does without" in messages[0] and "answers again" in messages[1]
    store.close()


def test_a_server_that_refuses_a_value_is_asked_for_others() -> None:
    redis = pytest.importorskip("redis", reason="the extra redis is not installed")
    with redis_server() as (url, _):
        store = opened(url, timeout_s=5)
        store.put("k", b"v")
        redis.Redis.from_url(url).config_set("maxmemory", "1")
        with pytest.raises(redis.exceptions.ResponseError, match="maxmemory"):
            store.put("l", b"v")
        assert store.get("k") == b"v"
        store.close()


def test_one_call_tries_after_a_while() -> None:
    now = [0.0]
    breaker = CircuitBreaker(10, lambda: now[0])
    assert breaker.allow() and breaker.allow() and not breaker.succeeded()
    assert breaker.failed() and not breaker.allow() and not breaker.failed()
    now[0] = 10
    assert breaker.allow() and not breaker.allow(), "others wait for the outcome of one"
    now[0] = 15
    assert not breaker.failed() and not breaker.allow()
    now[0] = 25
    assert breaker.allow() and breaker.succeeded() and breaker.allow()


def test_a_missing_package_and_a_bad_url_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match="result cache: the URL of the Redis server: found"):
        opened("http://example.test")
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(EngineError, match=r"the package redis is not installed; pip install -c constraints\.txt '\.\[redis\]'"):
        RedisStore("redis://127.0.0.1", None, LIMIT_S, 1)
