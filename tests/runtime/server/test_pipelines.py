"""Requests that are sent before those ahead of them are answered, and clients and servers that close at every point of it."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from belle_compile.runtime.server.routes import completions
from tests.runtime.server.live import WAIT_S, Live, live, read_all, wait_until
from tests.runtime.server.test_connections import GET, assert_served, response_of

SMALLEST_GET = b"GET / HTTP/1.1\r\n\r\n"


def post(path: str, *headers: str, version: str = "1.1", body: bytes = b"") -> bytes:
    lines = [f"POST {path} HTTP/{version}", "Host: test", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


WAIT, UNTIL_GONE, HALVES = post("/v1/wait"), post("/v1/until-gone"), post("/v1/halves")
LAST_GET = GET[:-2] + b"Connection: close\r\n\r\n"


@pytest.fixture(name="running")
def _running() -> Iterator[Live]:
    """A server whose semaphores no other test has used. It closes no connection of a test for its time limits."""
    with live(header_timeout_s=60.0) as running:
        yield running


def answered_late(running: Live, connection: socket.socket, request: bytes) -> None:
    """Send a request that is answered when the test says so, and wait until its route runs."""
    running.app.state.go_on.clear()
    connection.sendall(request)
    assert running.app.state.waiting.acquire(timeout=WAIT_S)


def pipelined(running: Live) -> int:
    """How many requests wait for those before them."""
    return sum(len(connection.pipeline) for connection in list(running.app.state.connections))


def nothing_is_left(running: Live) -> bool:
    return not (running.app.state.connections or running.server.server_state.tasks)


def test_forty_requests_behind_one_that_waits(running: Live) -> None:
    with running.connect() as connection:
        answered_late(running, connection, WAIT)
        connection.sendall(39 * GET + LAST_GET)
        wait_until(lambda: pipelined(running) > 0)
        running.app.state.go_on.set()
        data = read_all(connection)
    assert data.count(b"HTTP/1.1 200 OK") == 41 and data.count(b"page") == 40
    assert data.index(b"waited") < data.index(b"page")


def test_requests_that_wait_are_bounded_and_all_are_answered(running: Live) -> None:
    with running.connect() as connection:
        answered_late(running, connection, WAIT)
        connection.sendall(1000 * SMALLEST_GET + LAST_GET)
        wait_until(lambda: pipelined(running) > 0)
        assert pipelined(running) < 300
        running.app.state.go_on.set()
        assert read_all(connection).count(b"page") == 1001


def test_a_body_behind_many_requests(running: Live) -> None:
    body = b"x" * 300_000
    with running.connect() as connection:
        answered_late(running, connection, WAIT)
        connection.sendall(30 * GET + post("/v1/echo/a", body=body) + LAST_GET)
        running.app.state.go_on.set()
        data = read_all(connection)
    assert data.count(b"page") == 31 and b'"bytes":300000' in data


@pytest.mark.parametrize("behind", [1, 15, 40, 2000])
def test_a_client_that_goes_while_requests_wait(behind: int, running: Live) -> None:
    with running.connect() as connection:
        answered_late(running, connection, UNTIL_GONE)
        connection.sendall(behind * GET)
        wait_until(lambda: pipelined(running) > 0)
    assert running.app.state.gone.acquire(timeout=WAIT_S), "its answer would be computed to the end"
    wait_until(lambda: nothing_is_left(running))


@pytest.mark.parametrize(
    "request_bytes",
    [b"", b"GET / HTT", GET[:-2], post("/v1/echo/a", body=b"abc")[:-1], HALVES, HALVES + GET[:-2], HALVES + 40 * GET],
    ids=["nothing", "the first line", "headers", "a body", "a stream", "half a request behind it", "many behind it"],
)
@pytest.mark.parametrize("reset", [False, True])
def test_a_client_that_goes_at_any_point(request_bytes: bytes, reset: bool, running: Live) -> None:
    running.app.state.go_on.clear()
    with running.connect() as connection:
        connection.sendall(request_bytes)
        wait_until(lambda: bool(running.app.state.connections))
        if request_bytes.startswith(HALVES):
            assert running.app.state.waiting.acquire(timeout=WAIT_S)
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    wait_until(lambda: nothing_is_left(running))
    assert_served(running)


@pytest.mark.parametrize("behind", [b"", GET, 40 * GET, GET[:-2], post("/v1/echo/a", body=b"abc")[:-1], b"\x00 no HTTP\r\n"])
def test_nothing_behind_the_last_request_is_answered_or_harms_it(behind: bytes, running: Live) -> None:
    request = post("/v1/wait", "Connection: close")
    for together, apart in ((request + behind, b""), (request, behind)):
        with running.connect() as connection:
            answered_late(running, connection, together)
            connection.sendall(apart)
            running.app.state.go_on.set()
            data = read_all(connection)
        assert response_of(data)[0] == 200 and data.count(b"HTTP/1.1") == 1


def test_no_error_is_written_amid_a_response(running: Live) -> None:
    with running.connect() as connection:
        answered_late(running, connection, HALVES)
        connection.sendall(GET + b"\x00 no HTTP\r\n\r\n")
        data = read_all(connection)
    assert b"first," in data and data.count(b"HTTP/1.1") == 1 and b"second" not in data
    wait_until(lambda: nothing_is_left(running))


def test_a_request_behind_the_wish_for_another_protocol(running: Live) -> None:
    with running.connect() as connection:
        connection.sendall(GET[:-2] + b"Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n" + LAST_GET)
        assert read_all(connection).count(b"page") == 2


def test_draining_answers_the_requests_that_wait() -> None:
    with live() as running, running.connect() as connection:
        answered_late(running, connection, WAIT)
        connection.sendall(post("/v1/echo/a", body=b"abc") + 4 * GET)
        wait_until(lambda: pipelined(running) == 5)
        running.call(running.server.drain)
        wait_until(lambda: running.service.draining)
        running.app.state.go_on.set()
        data = read_all(connection)
        running.thread.join(WAIT_S)
        assert running.server.exit_code == 0
    assert data.count(b"HTTP/1.1 200 OK") == 6 and data.count(b"connection: close") == 1 and data.endswith(b"page")


@pytest.mark.parametrize("closing", [(), ("Connection: close",)])
def test_a_response_whose_end_is_not_read(closing: tuple[str, ...]) -> None:
    with live(keep_alive_timeout_s=0.2) as running, running.connect() as connection:
        connection.sendall(post("/v1/until-full", *closing))
        wait_until(lambda: bool(running.app.state.connections))
        wait_until(lambda: nothing_is_left(running))


def test_no_time_limit_ends_while_requests_wait() -> None:
    limit_s = 0.5
    with live(keep_alive_timeout_s=limit_s, header_timeout_s=limit_s) as running, running.connect() as connection:
        answered_late(running, connection, WAIT)
        connection.sendall(post("/v1/echo/a", body=100_000 * b"x") + 20 * GET + LAST_GET)
        wait_until(lambda: pipelined(running) > 0)
        time.sleep(2 * limit_s)
        running.app.state.go_on.set()
        assert read_all(connection).count(b"HTTP/1.1 200 OK") == 23


def test_the_pause_between_requests_is_that_of_the_option(running: Live) -> None:
    with running.connect():
        wait_until(lambda: bool(running.app.state.connections))
        (connection,) = running.app.state.connections
        assert connection.timeout_keep_alive == running.service.options.keep_alive_timeout_s


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_http_1_0_has_no_chunks(version: str, running: Live) -> None:
    with running.connect() as connection:
        connection.sendall(post("/v1/halves", "Connection: close", version=version))
        running.app.state.go_on.set()
        status, headers, body = response_of(read_all(connection))
    assert status == 200 and headers["connection"] == "close" and "content-length" not in headers
    assert ("transfer-encoding" in headers) == (version == "1.1")
    assert body == (b"first,second" if version == "1.0" else b"6\r\nfirst,\r\n6\r\nsecond\r\n0\r\n\r\n")


def test_http_1_0_with_a_body_of_known_length(running: Live) -> None:
    with running.connect() as connection:
        connection.sendall(GET.replace(b"1.1", b"1.0") + GET)
        status, headers, body = response_of(read_all(connection))
    assert status == 200 and headers["content-length"] == "4" and body == b"page"
    with running.connect() as connection:
        connection.sendall(b"HEAD /v1/halves HTTP/1.0\r\n\r\n")
        assert response_of(read_all(connection))[0] == 405


def test_an_answer_streamed_over_http_1_0(running: Live) -> None:
    running.app.include_router(completions.router)
    fields = b'{"prompt": "hello", "stream": true, "max_tokens": 20, "seed": 1, "ignore_eos": true}'
    bodies = {}
    for version in ("1.0", "1.1"):
        with running.connect() as connection:
            headers = ("Content-Type: application/json", "Connection: close")
            connection.sendall(post("/v1/completions", *headers, version=version, body=fields))
            bodies[version] = response_of(read_all(connection))[2]
    assert bodies["1.0"].startswith(b"data: ") and bodies["1.0"].endswith(b"data: [DONE]\n\n")
    assert not bodies["1.1"].startswith(b"data: ")


def test_a_client_that_ends_its_side_gets_what_costs_nothing(running: Live) -> None:
    with running.connect() as connection:
        connection.sendall(3 * GET)
        connection.shutdown(socket.SHUT_WR)
        data = read_all(connection)
    assert data.count(b"page") == 3


def test_a_client_that_ends_its_side_counts_as_gone_where_an_answer_is_computed(running: Live) -> None:
    for behind in (b"", GET):
        with running.connect() as connection:
            answered_late(running, connection, UNTIL_GONE + behind)
            connection.shutdown(socket.SHUT_WR)
            assert read_all(connection) == b""
            assert running.app.state.gone.acquire(timeout=WAIT_S)
