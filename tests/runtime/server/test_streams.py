"""Streams over real connections, where pieces are written past tasks and middleware: the same bytes, and the same ends."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from belle_compile.runtime.executors import StepBatch
from belle_compile.runtime.server import answers
from belle_compile.runtime.server.app import create_app
from belle_compile.runtime.server.options import ServerOptions
from belle_compile.runtime.server.serve import Server, bind
from belle_compile.runtime.server.service import Service
from tests.runtime.fakes import FakeExecutor
from tests.runtime.server.live import passing, read_all
from tests.runtime.server.serving import WAIT_S, events_of, serving, wait_until

LETTERS = {"logit_bias": {"70": 100}}  # each step's token is a character


class SteppedExecutor(FakeExecutor):
    """Runs a step for each permit."""

    def __init__(self) -> None:
        super().__init__(num_blocks=128, max_sequences=16, max_rows=32, max_tokens=64)
        self.permits = threading.Semaphore(0)

    def step(self, batch: StepBatch) -> Any:
        assert self.permits.acquire(timeout=WAIT_S)
        return super().step(batch)


class PacedExecutor(FakeExecutor):
    """Lets the event loop run between steps."""

    def __init__(self) -> None:
        super().__init__(num_blocks=128, max_sequences=16, max_rows=32, max_tokens=64)

    def step(self, batch: StepBatch) -> Any:
        time.sleep(0.002)
        return super().step(batch)


@contextlib.contextmanager
def served(executor: FakeExecutor | None = None) -> Iterator[tuple[Service, Any]]:
    """A service that listens on a port of the system's choice, and its address."""
    with serving(executor, ServerOptions(port=0), cache=False) as service:
        service.engine.self_test = passing  # type: ignore[method-assign]
        server, sockets = Server(create_app(service), service), bind(service.options)
        assert sockets is not None
        thread = threading.Thread(target=server.run, args=(sockets,))
        thread.start()
        try:
            wait_until(lambda: server.started)
            yield service, sockets[0].getsockname()
        finally:
            if isinstance(executor, SteppedExecutor):
                executor.permits.release(100_000)
            server.should_exit = True
            thread.join(WAIT_S)
        assert not thread.is_alive()


def ask(
    address: Any, path: str = "/v1/completions", *, close: bool = True, buffer: int | None = None, **fields: Any
) -> socket.socket:
    """Send a request for a stream."""
    body = json.dumps({"prompt": "hello", "stream": True, "temperature": 0} | fields).encode()
    connection = socket.socket()
    if buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    connection.settimeout(WAIT_S)
    connection.connect(address)
    head = f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    connection.sendall(head.encode() + b"Connection: close\r\n" * close + b"\r\n" + body)
    return connection


def body_of(response: bytes) -> str:
    """The body of a response in chunks, which must be complete."""
    head, _, rest = response.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ") and b"transfer-encoding: chunked" in head
    body = b""
    while True:
        size, _, rest = rest.partition(b"\r\n")
        if int(size, 16) == 0:
            assert rest == b"\r\n"
            return body.decode()
        body, rest = body + rest[: int(size, 16)], rest[int(size, 16) :]
        assert rest.startswith(b"\r\n")
        rest = rest[2:]


def texts_of(events: list[Any]) -> dict[int, str]:
    texts: dict[int, str] = {}
    for choice in (choice for event in events for choice in event["choices"]):
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    return texts


def written(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The parts that will be written at once."""
    parts: list[bytes] = []
    find = answers.writer_of

    def noted(scope: Any) -> Any:
        write = find(scope)
        assert write is not None

        def write_and_note(data: bytes) -> bool:
            done = write(data)
            if done:
                parts.append(data)
            return done

        return write_and_note

    monkeypatch.setattr(answers, "writer_of", noted)
    return parts


@pytest.mark.parametrize("n", [1, 3])
def test_what_is_written_at_once_is_what_is_sent_otherwise(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    fields = {"n": n, "seed": 3, "temperature": 0.8, "max_tokens": 40, "stream_options": {"include_usage": True}}
    bodies = []
    with served(PacedExecutor()) as (_, address):
        for at_once in (True, False):
            with monkeypatch.context() as patch:
                parts = written(patch)
                if not at_once:
                    patch.setattr(answers, "writer_of", lambda scope: None)
                events = events_of(body_of(read_all(ask(address, **fields))))
            assert bool(parts) == at_once
            assert events.pop() == "[DONE]" and events[-1]["usage"]["completion_tokens"] == 40 * n
            bodies.append(texts_of(events))
    assert bodies[0] == bodies[1] and len(bodies[0]) == n


def test_a_connection_goes_on_after_a_stream() -> None:
    with served(PacedExecutor()) as (_, address):
        connection = ask(address, close=False, max_tokens=20)
        data = b""
        while not data.endswith(b"0\r\n\r\n"):
            data += connection.recv(65536)
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")
        assert read_all(connection).startswith(b"HTTP/1.1 200 ")
        assert "[DONE]" in body_of(data)


def test_a_client_that_goes_amid_parts_that_are_written_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    parts, executor = written(monkeypatch), SteppedExecutor()
    with served(executor) as (service, address):
        connection = ask(address, max_tokens=100, n=2, **LETTERS)
        for steps in range(1, 200):
            executor.permits.release(1)
            wait_until(lambda steps=steps: len(executor.steps) == steps)  # type: ignore[misc]
            time.sleep(0.005)  # in which the event loop writes
            if len(parts) >= 4:
                break
        connection.close()
        wait_until(lambda: service.metrics.connections == 0)
        executor.permits.release(2)
        wait_until(lambda: service.engine.stats().running == 0)
        assert service.engine.stats().kv_blocks_used == 0 and service.engine.stats().cancellations == 2
        assert len(executor.steps) <= steps + 2


def test_a_failure_after_parts_that_were_written_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    parts, executor = written(monkeypatch), SteppedExecutor()
    with served(executor) as (_, address):
        connection = ask(address, max_tokens=100, **LETTERS)
        steps = 0
        while not parts:
            steps += 1
            executor.permits.release(1)
            wait_until(lambda steps=steps: len(executor.steps) == steps)  # type: ignore[misc]
            time.sleep(0.005)  # in which the event loop writes
        executor.failure = RuntimeError("broken")
        executor.permits.release(100)
        events = events_of(body_of(read_all(connection)))
        assert [event for event in events if "error" in event] == events[-1:]


def test_a_client_that_does_not_read_holds_up_nobody_and_gets_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a connection cannot take waits for its task, so that it is bounded by the answer and comes in order."""
    declined: list[bytes] = []
    find = answers.writer_of

    def noted(scope: Any) -> Any:
        write = find(scope)

        def write_padded(data: bytes) -> bool:
            done = write is not None and write(data + b": " + b"x" * 200_000 + b"\n\n")  # a comment of the stream
            if not done:
                declined.append(data)
            return done

        return write_padded

    monkeypatch.setattr(answers, "writer_of", noted)
    with served(PacedExecutor()) as (service, address):
        slow = ask(address, max_tokens=100, buffer=4096, **LETTERS)
        wait_until(lambda: bool(declined))
        quick = read_all(ask(address, max_tokens=1))
        assert b"[DONE]" in quick
        wait_until(lambda: service.engine.stats().running == 0)
        blocks = [block for block in body_of(read_all(slow)).split("\n\n") if not block.startswith(":")]
        events = events_of("\n\n".join(blocks))
        assert events.pop() == "[DONE]"
        (text,) = texts_of(events).values()
        assert len(text) == 100


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"max_tokens": 40}),
        ("/v1/completions", {"max_tokens": 40, "stream": False}),
        ("/v1/completions", {"max_tokens": 40, "prompt": "long " * 1000}),  # encoded on another thread
        ("/v1/completions", {"max_tokens": -1}),
        ("/v1/completions", {"model": "another"}),
        ("/v1/nothing", {}),
        ("/tokenize", {}),
    ],
)
def test_a_request_is_announced_until_it_is_submitted_or_answered(path: str, fields: dict[str, Any]) -> None:
    executor = SteppedExecutor()
    with served(executor) as (service, address):
        announced, begin = [], service.engine.arrivals.begin
        service.engine.arrivals.begin = lambda: announced.append(path) or begin()  # type: ignore[func-returns-value, method-assign]
        connection = ask(address, path, **fields)
        wait_until(lambda: bool(announced) and service.engine.arrivals.announced == 0)  # no step has run yet
        executor.permits.release(100_000)
        assert read_all(connection).startswith(b"HTTP/1.1 ")
    assert announced == [path] and service.engine.arrivals.announced == 0
