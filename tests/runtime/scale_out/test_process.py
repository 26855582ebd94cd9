"""A replica's server process and what is forwarded to it, without Ray: servers of the standard library on Unix sockets."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

pytest.importorskip("aiohttp", reason="no aiohttp")

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.scale_out.ingress import Ingress
from belle_compile.runtime.scale_out.process import Forwarded, Head, Lost, ServerProcess

# Answers by path: /ready, /echo with what it got, /half with half a body of its type and then waits, as /wait does. It tells in
# /gone how many connections of /wait were closed. On SIGTERM it ends with code 7.
SERVER = """
import http.server, json, os, signal, socketserver, sys, time, select
gone = 0
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def address_string(self): return ""
    def log_message(self, *_): pass
    def answer(self, body, type="application/json", length=None):
        self.send_response(200)
        self.send_header("Content-Type", type)
        if type == "text/event-stream": self.send_header("Transfer-Encoding", "chunked")
        else: self.send_header("Content-Length", str(length or len(body)))
        self.send_header("Keep-Alive", "timeout=5")
        self.end_headers()
        if type == "text/event-stream": body = b"%x\\r\\n%s\\r\\n" % (len(body), body)
        self.wfile.write(body); self.wfile.flush()
    def do_POST(self):
        global gone
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/ready": return self.answer(b"{}")
        if self.path == "/gone": return self.answer(str(gone).encode())
        if self.path.startswith("/echo"):
            got = {"path": self.path, "method": self.command, "body": body.decode(), "headers": dict(self.headers)}
            return self.answer(json.dumps(got).encode())
        if self.path == "/half": self.answer(b"data: 1\\n\\n", "text/event-stream")
        if self.path == "/half-json": self.answer(b"[1,", length=9)
        select.select([self.connection], [], [])
        gone += 1
        self.close_connection = True
    do_GET = do_POST
class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
signal.signal(signal.SIGTERM, lambda *_: os._exit(7))
Server(sys.argv[1], Handler).serve_forever()
"""
COMMAND = [sys.executable, "-c", SERVER]
WAIT_S = 60.0


def run(test: Callable[[ServerProcess], Awaitable[None]], command: list[str] = COMMAND) -> None:
    """Run a test with a server, in bounded time; no process is left."""

    async def work() -> None:
        server = ServerProcess(command)
        try:
            await asyncio.wait_for(test(server), WAIT_S)
        finally:
            await server.stop(0)
        assert not server.alive

    asyncio.run(work())


def request(path: str, method: str = "GET", body: bytes = b"", **headers: str) -> Forwarded:
    return Forwarded(method, path, tuple(headers.items()), body)


async def collect(messages: AsyncIterator[Head | bytes | Lost]) -> tuple[Head, bytes, Lost | None]:
    head, body, lost = None, b"", None
    async for message in messages:
        if isinstance(message, Head):
            head = message
        elif isinstance(message, bytes):
            body += message
        else:
            lost = message
    assert head
    return head, body, lost


def test_a_request_arrives_as_it_is() -> None:
    async def test(server: ServerProcess) -> None:
        import json

        await server.wait_ready(WAIT_S)
        sent = request("/echo%2Fa?b=%20c", "POST", b'{"x": 1}', Authorization="Bearer k", Connection="close", Host="public")
        head, body, lost = await collect(server.forward(sent))
        got = json.loads(body)
        assert (head.status, lost) == (200, None)
        assert (got["path"], got["method"], got["body"]) == ("/echo%2Fa?b=%20c", "POST", '{"x": 1}')
        assert got["headers"]["Authorization"] == "Bearer k" and got["headers"]["Host"] == "replica"
        assert not {"Connection", "Accept", "Accept-Encoding", "User-Agent"} & set(got["headers"])
        names = [name for name, _ in head.headers]
        assert "Content-Length" in names and "Keep-Alive" not in names

    run(test)


def test_a_caller_that_is_cancelled_closes_the_connection() -> None:
    async def test(server: ServerProcess) -> None:
        await server.wait_ready(WAIT_S)
        waiting = asyncio.create_task(collect(server.forward(request("/wait"))))
        await asyncio.sleep(0.3)
        waiting.cancel()
        while await server.text("/gone") != "1":
            await asyncio.sleep(0.05)

    run(test)


def test_a_killed_server_is_lost_for_its_requests() -> None:
    async def test(server: ServerProcess) -> None:
        await server.wait_ready(WAIT_S)
        messages = server.forward(request("/half"))
        assert isinstance(await anext(messages), Head) and await anext(messages) == b"data: 1\n\n"
        os.kill(server.pid, signal.SIGKILL)
        assert [message async for message in messages] == [Lost("The server of the replica was lost.", sent=True)]
        while server.alive:
            await asyncio.sleep(0.01)
        assert not await server.ready()
        later = [message async for message in server.forward(request("/echo"))]
        assert later == [Lost("The server of the replica has ended.", sent=False)]

    run(test)


def test_a_server_that_ends_or_hangs_does_not_get_ready() -> None:
    async def ends(server: ServerProcess) -> None:
        with pytest.raises(EngineError, match="has ended: found exit code 3"):
            await server.wait_ready(WAIT_S)

    async def hangs(server: ServerProcess) -> None:
        with pytest.raises(EngineError, match=r"does not get ready: expected /ready within 0\.3 s"):
            await server.wait_ready(0.3)

    run(ends, [sys.executable, "-c", "import sys; sys.exit(3)"])
    run(hangs, [sys.executable, "-c", "import time; time.sleep(60)"])


def test_a_server_gets_time_to_drain() -> None:
    async def test() -> None:
        server = ServerProcess(COMMAND)
        await server.wait_ready(WAIT_S)
        assert await server.stop(WAIT_S) == 7
        stubborn = ServerProcess([sys.executable, "-c", "import signal, time; signal.signal(15, 1); time.sleep(60)"])
        assert await stubborn.stop(0.5) in (-signal.SIGKILL, -signal.SIGTERM)

    asyncio.run(asyncio.wait_for(test(), WAIT_S))


def test_the_server_ends_with_a_replica_that_is_killed() -> None:
    script = (
        "import asyncio, sys\n"
        "from belle_compile.runtime.scale_out.process import ServerProcess\n"
        "async def main():\n"
        f"    server = ServerProcess([sys.executable, '-c', {SERVER!r}])\n"
        "    await server.wait_ready(60)\n"
        "    print(server.pid, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )

    async def test() -> None:
        replica = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE)
        assert replica.stdout
        pid = int(await replica.stdout.readline())
        replica.kill()
        await replica.wait()
        while os.path.exists(f"/proc/{pid}"):
            await asyncio.sleep(0.05)

    asyncio.run(asyncio.wait_for(test(), WAIT_S))


async def answer(ingress: Ingress, path: str = "/v1/completions", body: bytes = b'{"prompt": "a"}') -> list[Any]:
    """The messages of an application's answer."""
    scope = {
        "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"", "headers": [],
        "root_path": "", "scheme": "http", "server": ("h", 80),
    }  # fmt: skip
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    await ingress(scope, receive, send)
    return sent


class Replicas:
    """Gives prepared messages, those of one attempt after those of another, and keeps the keys of the attempts."""

    def __init__(self, *attempts: list[Head | bytes | Lost]) -> None:
        self._attempts, self.keys = list(attempts), list[str]()

    async def route(self, request: Forwarded, key: str) -> AsyncIterator[Head | bytes | Lost]:
        self.keys.append(key)
        for message in self._attempts.pop(0):
            yield message


EVENTS = Head(200, (("Content-Type", "text/event-stream; charset=utf-8"),))
OK = Head(200, (("Content-Type", "application/json"), ("Content-Length", "2")))


def test_a_request_that_was_not_sent_goes_to_another_replica() -> None:
    replicas = Replicas([Lost("gone.", sent=False)], [OK, b"{}"])
    sent = asyncio.run(answer(Ingress(replicas.route, 8, 100)))
    assert (sent[0]["status"], sent[1]["body"]) == (200, b"{}") and not sent[-1]["more_body"]
    first, second = replicas.keys
    assert len(first) == 64 and second == f"{first}.1"


def test_a_request_that_was_lost_is_an_error_and_not_sent_again() -> None:
    replicas = Replicas([Lost("The replica was lost.", sent=True)])
    sent = asyncio.run(answer(Ingress(replicas.route, 8, 100)))
    assert sent[0]["status"] == 503 and (b"retry-after", b"1") in sent[0]["headers"]
    assert b'"code":"replica_lost"' in sent[1]["body"] and len(replicas.keys) == 1


def test_no_replica_at_all_is_an_error() -> None:
    replicas = Replicas(*[[Lost("There is no replica.", sent=False)] for _ in range(8)])
    sent = asyncio.run(answer(Ingress(replicas.route, 8, 100)))
    assert sent[0]["status"] == 503 and len(set(replicas.keys)) == 8


def test_a_broken_stream_ends_with_an_error_event() -> None:
    replicas = Replicas([EVENTS, b"data: 1\n\n", Lost("The server of the replica was lost.", sent=True)])
    sent = asyncio.run(answer(Ingress(replicas.route, 8, 100)))
    body = b"".join(message.get("body", b"") for message in sent)
    assert (
        body.startswith(b'data: 1\n\ndata: {"error":{"message":"The server of the replica was lost.') and b"[DONE]" not in body
    )


def test_a_broken_body_is_not_taken_for_whole() -> None:
    replicas = Replicas([OK, b"{", Lost("The server of the replica was lost.", sent=True)])
    with pytest.raises(ConnectionError, match="was lost"):
        asyncio.run(answer(Ingress(replicas.route, 8, 100)))


@pytest.mark.parametrize("path", ["/admin/engine", "/metrics", "/stats", "/v1/load_lora_adapter"])
def test_paths_of_one_server_are_refused(path: str) -> None:
    replicas = Replicas()
    sent = asyncio.run(answer(Ingress(replicas.route, 8, 100), path))
    assert sent[0]["status"] == 404 and b"not_scaled_out" in sent[1]["body"] and replicas.keys == []


def test_a_body_has_a_limit() -> None:
    replicas = Replicas()
    sent = asyncio.run(answer(Ingress(replicas.route, 8, 100), body=b"x" * 101))
    assert sent[0]["status"] == 413 and replicas.keys == []
