"""A fault at every await and every allocation of the request path, one by one: nothing leaks, and the server goes on.

A scenario is one or two requests. It runs once to learn which points it passes, and then once for each of these and each
kind of fault. The client of a request with a fault gets its answer, an error object, or a stream that breaks off. Then the
engine and the server hold nothing of it, all rows of the block table are free, and the same requests are answered as they
were, bit for bit.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from belle_compile.runtime.engine import Engine
from belle_compile.runtime.server.app import create_app
from belle_compile.runtime.server.errors import CLIENT_GONE
from belle_compile.runtime.server.options import ServerOptions
from belle_compile.runtime.server.serve import Server, bind
from belle_compile.runtime.server.service import Service
from belle_compile.runtime.serving.result_cache.options import ResultCacheOptions
from belle_compile.runtime.serving.scheduling import SchedulerOptions
from tests.runtime.fakes import FakeExecutor, make_directory, make_engine
from tests.runtime.server.fault_injection import (
    AFTER,
    BEFORE,
    Fault,
    Faults,
    InjectedError,
    InjectedReset,
    InjectedShortage,
    Instrumented,
    find_points,
)  # fmt: skip
from tests.runtime.server.fault_points import NEVER_CANCELLED, NOT_PASSED, NOTHING_FOLLOWS, PASSED
from tests.runtime.server.live import passing, wait_until

WAIT_S = 10.0
LEAVES_S = 0.05  # after which a client leaves whose answer has not begun
ROWS = 4  # sequences that run at the same time
MOST_OCCURRENCES = 3  # of a point in a scenario at which faults happen: steps repeat
KEYS = ("first", "second")  # of the clients, which may have one request each under way
CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3, "seed": 1}
COMPLETION = {"prompt": "hello world", "max_tokens": 3, "seed": 2}
GRAMMAR = {"regex": "[ab]{2}", "max_tokens": 6}
CHATS, COMPLETIONS, TOKENIZE, SWAP = "/v1/chat/completions", "/v1/completions", "/tokenize", "/admin/engine"
ADMIN = "root"


Requests = tuple[tuple[str, dict[str, Any]], ...]


@dataclass(frozen=True)
class Scenario:
    """Requests (path, body) that are sent one after the other without waiting for answers, and how the engine is set up."""

    requests: Requests
    version: str = "1.1"
    padding: int = 0  # bytes by which bodies are longer
    store: str | None = None  # of the result cache
    num_blocks: int = 32
    headers: dict[str, str] = field(default_factory=dict)
    leaves: bool = False  # the clients close their connections without reading


SCENARIOS = {
    "chat": Scenario(((CHATS, CHAT),)),
    "chat in a stream": Scenario(((CHATS, CHAT | {"stream": True}),)),
    "two answers": Scenario(((COMPLETIONS, COMPLETION | {"n": 2}),)),
    "two answers in a stream": Scenario(((COMPLETIONS, COMPLETION | {"n": 2, "stream": True}),)),
    "a grammar": Scenario(((COMPLETIONS, COMPLETION | GRAMMAR | {"stream": True}),)),
    "read aside": Scenario(((CHATS, CHAT),), padding=5000),
    "cached in memory": Scenario(((CHATS, CHAT),), store="memory"),
    # Without a lookup, so that each answer is stored again.
    "cached in a file": Scenario(
        ((COMPLETIONS, COMPLETION | {"stream": True}),), store="sqlite:", headers={"Cache-Control": "no-cache"}
    ),
    "not looked up": Scenario(((CHATS, CHAT),), store="memory", headers={"Cache-Control": "no-cache"}),
    "twice at once": Scenario(((CHATS, CHAT | {"timeout": 60}),) * 2, store="memory"),
    "without chunks": Scenario(((COMPLETIONS, COMPLETION | {"stream": True}),), version="1.0"),
    "preempted": Scenario(((COMPLETIONS, {"prompt": "x" * 30, "max_tokens": 50, "seed": 2, "n": 2}),), num_blocks=8),
    "one prefix": Scenario(((COMPLETIONS, {"prompt": "x" * 70, "max_tokens": 2, "seed": 2}),) * 2),
    "a client that leaves": Scenario(((CHATS, CHAT | {"max_tokens": 100, "ignore_eos": True}),), leaves=True),
    "a shared answer that is left": Scenario(
        ((CHATS, CHAT | {"max_tokens": 100, "ignore_eos": True, "stream": True}),) * 2, store="memory", leaves=True
    ),
    "tokenized": Scenario(((TOKENIZE, {"prompt": "hello"}),)),
    "tokenized aside": Scenario(((TOKENIZE, {"prompt": "hello"}),), padding=5000),
    "detokenized": Scenario((("/detokenize", {"tokens": [5, 6]}),)),
    "refused": Scenario(((CHATS, CHAT | {"temperature": -1}),)),
    "without a key": Scenario(((CHATS, CHAT),), headers={"Authorization": "Bearer other"}),
    "an adapter": Scenario((("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "/x"}),)),
    "an adapter less": Scenario((("/v1/unload_lora_adapter", {"lora_name": "a"}),)),
    "another engine": Scenario(((SWAP, {}),), headers={"Authorization": f"Bearer {ADMIN}"}),
}


class Running:
    """A server of a scenario, on a thread."""

    def __init__(self, scenario: Scenario, directory: Path) -> None:
        self.scenario = scenario
        self._directory = directory
        self.engines: list[Engine] = []
        keys = [f'[[keys]]\nname = "{key}"\nkey = "{key}"\nmax_concurrent = 1\n' for key in KEYS]
        (directory / "keys.toml").write_text("".join(keys), encoding="utf-8")
        options = ServerOptions(port=0, api_key_file=directory / "keys.toml", admin_key=ADMIN)
        saved = make_directory(directory / "engine", {"weights": b"x"})
        self.service = Service(self._load(saved), options, directory=saved, load=self._load)
        self.server = Server(create_app(self.service), self.service)
        self._sockets = bind(self.service.options)
        assert self._sockets
        self.address = self._sockets[0].getsockname()
        self._thread = threading.Thread(target=self.server.run, args=(self._sockets,))
        self._tasks: set[Any] = set()

    def _load(self, directory: Path, **_: Any) -> Engine:
        """An engine of the scenario."""
        scenario = self.scenario
        store = f"sqlite:{self._directory / 'cache.db'}" if scenario.store == "sqlite:" else scenario.store
        executor = FakeExecutor(num_blocks=scenario.num_blocks, max_sequences=ROWS, max_rows=2 * ROWS, max_tokens=64)
        results = ResultCacheOptions(store) if store else None
        engine = make_engine(executor, results, SchedulerOptions(max_queue=ROWS))
        engine.self_test = passing  # type: ignore[method-assign]
        self.engines.append(engine)
        return engine

    def __enter__(self) -> Running:
        self._thread.start()
        wait_until(lambda: self.server.started and self.service.current.ready)
        self._loop = self.server.servers[0].get_loop()
        wait_until(self._is_idle)
        self._tasks = asyncio.all_tasks(self._loop)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self._thread.join(WAIT_S)
        self.service.close()
        for engine in self.engines:
            engine.close()
        assert not self._thread.is_alive()

    def _is_idle(self) -> bool:
        return not self.server.server_state.connections and not self.held()

    def ask(self, requests: Requests, headers: dict[str, str], *, leaves: bool = False) -> list[bytes]:
        """Send requests over a connection each, and return all that comes back, which nobody reads who `leaves`."""
        connections = []
        for key, (path, body) in zip(KEYS, requests, strict=False):
            connection = socket.create_connection(self.address, WAIT_S)
            content = json.dumps(body).encode() + b" " * self.scenario.padding
            lines = {
                "Host": "x",
                "Content-Type": "application/json",
                "Content-Length": str(len(content)),
                "Connection": "close",
            }
            lines |= {"Authorization": f"Bearer {key}", "X-Request-Id": "x"} | headers
            head = [f"POST {path} HTTP/{self.scenario.version}", *(f"{name}: {value}" for name, value in lines.items()), "", ""]
            connection.sendall("\r\n".join(head).encode() + content)
            connections.append(connection)
        if leaves:
            end = time.monotonic() + LEAVES_S
            while self.service.engine.stats().running < len(requests) and time.monotonic() < end:
                time.sleep(0.0005)
            for connection in connections:
                connection.close()
            return [b""] * len(connections)
        return [_read(connection) for connection in connections]

    def ask_again(self) -> list[bytes]:
        """Send the requests of the scenario, and return what depends on them alone of the responses."""
        return [_comparable(data) for data in self.ask(self.scenario.requests, self.scenario.headers)]

    def try_out(self) -> list[bytes]:
        """Do what the scenario is about."""
        return self.ask(self.scenario.requests, self.scenario.headers, leaves=self.scenario.leaves)

    def held(self) -> dict[str, int]:
        """What is held of requests, each count of which is to be 0."""
        engine, counts = self.service.engine, {}
        stats = engine.stats()
        counts["running"], counts["waiting"], counts["blocks"] = stats.running, stats.waiting, stats.kv_blocks_used
        counts["announced"], counts["requests"] = engine.arrivals.announced, self.service.current.requests
        counts["engines"] = sum(not other.executor.closed for other in self.engines if other is not engine)  # type: ignore[attr-defined]
        return {name: count for name, count in counts.items() if count}

    def check(self) -> None:
        """Fail where anything is held."""
        end = time.monotonic() + WAIT_S
        while held := self.held() or asyncio.all_tasks(self._loop) - self._tasks:
            assert self.service.engine.alive(WAIT_S), "the engine has died"
            assert time.monotonic() < end, f"left over: {held}"
            time.sleep(0.0005)
        if cache := self.service.engine.result_cache:
            cache.flush()  # answers are stored on a thread of the cache's own

    def check_rows(self) -> None:
        """Fail where not all rows of the block table, all places in the queue and all blocks can be had."""
        taken: list[tuple[int, int]] = self.service.engine.executor.steps  # type: ignore[attr-defined]
        steps = len(taken)
        request = (COMPLETIONS, {"prompt": "xy", "max_tokens": 2, "n": ROWS, "ignore_eos": True})
        (data,) = self.ask((request,), {"Cache-Control": "no-cache, no-store"})
        assert data.partition(b"\r\n")[0].endswith(b"200 OK"), data
        assert max(rows for _, rows in taken[steps:]) == ROWS, "rows of the block table are lost"


def _read(connection: socket.socket) -> bytes:
    data = b""
    with connection, contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            data += piece
    return data


def _body(data: bytes) -> tuple[int, bytes, bool]:
    """Status, body, and whether the body is whole."""
    head, _, body = data.partition(b"\r\n\r\n")
    status = int(head.split()[1])
    if b"chunked" in head.lower():
        whole, content = body.endswith(b"0\r\n\r\n"), b""
        while (size := body.partition(b"\r\n")[0]) not in (b"", b"0"):
            content += body[len(size) + 2 : len(size) + 2 + int(size, 16)]
            body = body[len(size) + 4 + int(size, 16) :]
        return status, content, whole
    length = re.search(rb"content-length: (\d+)", head.lower())
    return status, body, length is None or len(body) == int(length[1])


def _comparable(data: bytes) -> bytes:
    """A response without what depends on the time and on other requests; the events of a stream sorted."""
    status, body, whole = _body(data)
    assert whole, data
    body = re.sub(rb'"(created|cached_tokens)":\d+', b"", body)
    return b"%d " % status + b"\n".join(sorted(body.split(b"\n\n")))


def _check_told(data: bytes, expected: bytes, fault: Fault) -> None:
    """Fail where the client of a request with a fault was neither answered nor told."""
    if not data:
        assert fault.point.startswith("server.connections: "), "silence where the connection itself has not failed"
        return
    status, body, whole = _body(data)
    if status == 200 and whole and b'"error"' not in body:
        is_cut = b"[DONE]" in expected and b"[DONE]" not in body  # in HTTP/1.0 nothing tells where a body ends
        assert is_cut or _comparable(data) == expected, f"another answer: {data!r}"
    elif status == 200:
        assert b"[DONE]" not in body
    elif whole and status != CLIENT_GONE:
        error = json.loads(body)["error"]
        assert set(error) == {"message", "type", "param", "code"} and "injected" not in error["message"]


def _kinds(name: str, position: str, awaits: bool) -> tuple[type[BaseException] | None, ...]:
    if not awaits:
        return (InjectedShortage,)
    if name.startswith(NEVER_CANCELLED):
        return (InjectedError,) if position == BEFORE else ()
    if position == AFTER:
        return (asyncio.CancelledError,)
    return (InjectedReset if "await send(" in name else InjectedError, None)


@functools.cache
def _points() -> dict[str, bool]:
    return {point.name: point.awaits for point in find_points()}


@pytest.fixture
def faults(caplog: pytest.LogCaptureFixture) -> Iterator[Faults]:
    logging.disable(logging.CRITICAL)  # each fault is logged
    try:
        with Instrumented() as faults:
            yield faults
    finally:
        logging.disable(logging.NOTSET)


def test_the_list_has_each_point() -> None:
    listed = [*PASSED, *NOT_PASSED]
    assert len(set(listed)) == len(listed)
    missing, gone = sorted(set(_points()) - set(listed)), sorted(set(listed) - set(_points()))
    assert not missing and not gone, f"to be listed: {missing}; not in the program: {gone}"
    assert set(PASSED.values()) <= set(SCENARIOS)


def _faults_of(name: str, passed: dict[tuple[str, str], int]) -> Iterator[Fault]:
    """The faults of a scenario: all those at the points that the list gives it, and one before each of the other points that
    serve a request, since each scenario gets there with something else in its hands."""
    for (point, position), count in sorted(passed.items()):
        kinds = _kinds(point, position, _points()[point])
        if PASSED.get(point, name) == name:
            if (point, position) not in NOTHING_FOLLOWS:
                for error in kinds:
                    yield from (Fault(point, position, number, error) for number in range(1, min(count, MOST_OCCURRENCES) + 1))
        elif position == BEFORE and point.startswith(("server.answers", "serving.")) and name != "preempted":
            yield Fault(point, position, count, kinds[-1])


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_fault_at_each_point_leaks_nothing(
    name: str, faults: Faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("belle_compile.runtime.server.engine_swap._SETTLE_S", 0)
    for function in ("unfreeze", "collect", "freeze"):  # which take long among the objects of many tests
        monkeypatch.setattr(gc, function, lambda: 0)
    with Running(SCENARIOS[name], tmp_path) as running:
        expected = running.ask_again()
        running.check()
        faults.set(None)
        running.try_out()
        running.check()
        passed = dict(faults.passed)
        for fault in _faults_of(name, passed):
            faults.set(fault)
            answers = running.try_out()
            faults.set(None)
            try:
                if not running.scenario.leaves:
                    for data, answer in zip(answers, expected, strict=True):
                        _check_told(data, answer, fault)
                running.check()
                assert running.ask_again() == expected
                running.check_rows()
                running.check()
            except Exception as failure:
                raise AssertionError(f"{fault}: {failure!r}") from failure
    not_passed = {point for point, scenario in PASSED.items() if scenario == name} - {point for point, _ in passed}
    assert not not_passed, "the list says that the scenario passes them"
