"""Clients that are slow, send too much or are too many, and those beside them."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.runtime.server.live import WAIT_S, Live, live, read_all, wait_until

GET = b"GET / HTTP/1.1\r\nHost: test\r\n\r\n"
SHORT_S = 0.2


@pytest.fixture(name="quick", scope="module")
def _quick() -> Iterator[Live]:
    """A server with short time limits and small sizes."""
    with live(header_timeout_s=SHORT_S, keep_alive_timeout_s=SHORT_S, max_body_bytes=1000) as running:
        yield running


@pytest.fixture(name="patient", scope="module")
def _patient() -> Iterator[Live]:
    """A server with long time limits, which closes no connection of a test by itself."""
    with live(header_timeout_s=60.0, max_body_bytes=1000, max_connections=600) as running:
        yield running


def assert_served(running: Live) -> None:
    with running.client() as client:
        assert client.get("/").text == "page"


def drip(connection: socket.socket, data: bytes) -> None:
    """Send bytes again and again until the server closes the connection."""
    end = time.monotonic() + WAIT_S
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        while time.monotonic() < end:
            connection.sendall(data)
            connection.settimeout(0.02)
            with contextlib.suppress(TimeoutError):
                if not connection.recv(65536):
                    return
        pytest.fail("the connection was not closed")


def reads_page(connection: socket.socket) -> bool:
    """Whether the next response is the page; head and body may come apart."""
    data = b""
    while not data.endswith(b"page") and (piece := connection.recv(65536)):
        data += piece
    return data.endswith(b"page")


def response_of(data: bytes) -> tuple[int, dict[str, str], bytes]:
    head, _, body = data.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    return int(status.split()[1]), dict(line.lower().split(": ", 1) for line in lines), body


def test_slow_headers(quick: Live) -> None:
    with quick.connect() as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n")
        drip(connection, b"X: y\r\n")
    assert_served(quick)


def test_headers_that_do_not_end(quick: Live) -> None:
    with quick.connect() as connection:
        connection.sendall(b"POST /v1/echo/a HTTP/1.1\r\nHost")
        assert read_all(connection) == b""


@pytest.mark.parametrize("data", [b"", b"\r\n"])
def test_a_connection_without_requests(data: bytes, quick: Live) -> None:
    with quick.connect() as connection:
        if data:
            drip(connection, data)
        else:
            assert read_all(connection) == b""


def test_a_connection_after_its_request(quick: Live) -> None:
    with quick.connect() as connection:
        connection.sendall(GET)
        assert response_of(read_all(connection))[0] == 200
    with quick.connect() as connection:
        connection.sendall(GET)
        drip(connection, b"\r\n")


def test_a_body_that_stops(quick: Live) -> None:
    with quick.connect() as connection:
        connection.sendall(b"POST /v1/echo/a HTTP/1.1\r\nHost: test\r\nContent-Length: 10\r\n\r\nabc")
        assert read_all(connection) == b""


def test_a_refused_body_is_not_read_forever(quick: Live) -> None:
    with quick.connect() as connection:
        connection.sendall(b"POST /v1/echo/a HTTP/1.1\r\nHost: test\r\nContent-Length: 999999999\r\n\r\n")
        drip(connection, b"x")


def test_a_client_that_does_not_read(quick: Live) -> None:
    with quick.connect() as connection:
        connection.sendall(b"POST /v1/flood HTTP/1.1\r\nHost: test\r\nContent-Length: 0\r\n\r\n")
        wait_until(lambda: bool(quick.server.server_state.tasks))
        wait_until(lambda: not quick.server.server_state.tasks)
    assert_served(quick)


def test_waiting_for_an_answer_takes_as_long_as_it_takes(quick: Live) -> None:
    quick.app.state.go_on.clear()
    with quick.connect() as connection:
        connection.sendall(b"POST /v1/wait HTTP/1.1\r\nHost: test\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        time.sleep(3 * SHORT_S)
        quick.app.state.go_on.set()
        assert response_of(read_all(connection))[0] == 200


def test_requests_one_after_the_other_and_at_once(patient: Live) -> None:
    with patient.connect() as connection:
        for _ in range(3):
            connection.sendall(GET)
            assert reads_page(connection)
        connection.sendall(3 * GET + GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        assert read_all(connection).count(b"HTTP/1.1 200 OK") == 4


def test_headers_that_are_too_large(patient: Live) -> None:
    with patient.connect() as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(b"GET / HTTP/1.1\r\n")
            for _ in range(2000):
                connection.sendall(b"X: " + b"y" * 1000 + b"\r\n")
                time.sleep(0)
        data = read_all(connection)
    if data:  # which is lost where more was on the way to the server
        assert response_of(data)[0] == 431
    assert_served(patient)


def test_the_wish_for_another_protocol_is_ignored(patient: Live, caplog: pytest.LogCaptureFixture) -> None:
    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AA==\r\n\r\n"
    with patient.connect() as connection:
        connection.sendall(GET[:-2] + upgrade)
        assert reads_page(connection)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_trailers_are_dropped(patient: Live) -> None:
    def served() -> Any:
        known = list(patient.server.server_state.connections)
        return next((one for one in known if one.cycle and one.cycle.scope["path"] == "/v1/wait"), None)

    patient.app.state.go_on.clear()
    with patient.connect() as connection:
        head = b"POST /v1/wait HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
        connection.sendall(head + b"3\r\nabc\r\n0\r\nX-Late: y\r\n\r\n")
        wait_until(lambda: served() is not None and not served().cycle.more_body)
        headers = served().headers
        assert [name for name, _ in headers] == [b"host", b"transfer-encoding", b"connection"]
        assert patient.app.state.waiting.acquire(timeout=WAIT_S), "which another test would take for its own"
        patient.app.state.go_on.set()
        assert response_of(read_all(connection))[0] == 200


def test_what_is_not_http(patient: Live) -> None:
    with patient.connect() as connection:
        connection.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        status, headers, body = response_of(read_all(connection))
    assert status == 400 and headers["connection"] == "close" and json.loads(body)["error"]["code"] == "invalid_http"


def test_a_refused_body_leaves_the_connection_usable(patient: Live) -> None:
    with patient.client() as client:
        for content in (b"x" * 200_000, iter([b"x" * 100_000] * 2)):
            response = client.post("/v1/echo/a", content=content)
            assert response.status_code == 413 and response.json()["error"]["code"] == "request_too_large"
        assert client.post("/v1/echo/a", content=b"abc").json()["bytes"] == 3


def test_expect_100_continue_is_not_asked_to_continue(patient: Live) -> None:
    with patient.connect() as connection:
        connection.sendall(b"POST /v1/echo/a HTTP/1.1\r\nHost: test\r\nContent-Length: 9999\r\nExpect: 100-continue\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 413")


def test_many_idle_connections(patient: Live) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(500):
            stack.enter_context(patient.connect())
        wait_until(lambda: patient.service.metrics.connections >= 500)
        assert_served(patient)
    wait_until(lambda: patient.service.metrics.connections == 0)


def test_too_many_connections_are_refused() -> None:
    with live(max_connections=2) as running:
        with running.connect(), running.connect():
            wait_until(lambda: running.service.metrics.connections == 2)
            with running.connect() as third:
                status, headers, body = response_of(read_all(third))
            assert status == 503 and headers["retry-after"] == "1"
            assert json.loads(body)["error"]["code"] == "too_many_connections"
        wait_until(lambda: running.service.metrics.connections == 0)
        assert_served(running)
        assert b"belle:http_connections_refused_total 1.0" in running.service.metrics.exposition()


def test_a_unix_socket(tmp_path: Any) -> None:
    with live(uds=tmp_path / "belle.sock"):
        transport = httpx.HTTPTransport(uds=str(tmp_path / "belle.sock"))
        with httpx.Client(transport=transport, base_url="http://test", timeout=WAIT_S) as client:
            assert client.get("/").text == "page"
