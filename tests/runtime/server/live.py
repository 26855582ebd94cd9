"""A served fake engine: an application behind the server's middleware, and a server of it on a port of the system's choice."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse

from belle_compile.runtime.selftest import SelfTest
from belle_compile.runtime.server.context import context_of
from belle_compile.runtime.server.errors import ApiError, install_handlers
from belle_compile.runtime.server.middleware import install
from belle_compile.runtime.server.options import ServerOptions
from belle_compile.runtime.server.routes import health
from belle_compile.runtime.server.serve import Server, bind
from belle_compile.runtime.server.service import Service
from tests.runtime.fakes import FakeExecutor, make_engine

WAIT_S = 20.0  # the longest that a test waits for anything


def passing() -> SelfTest:
    """A self-test that passes."""
    return SelfTest(2, 8, 0.1)


def make_service(executor: FakeExecutor | None = None, self_test: Callable[[], SelfTest] = passing, **options: Any) -> Service:
    """A service of a fake engine, which is to be closed."""
    engine = make_engine(executor)
    engine.self_test = self_test  # type: ignore[method-assign]
    return Service(engine, ServerOptions(**options))


def make_app(service: Service) -> FastAPI:
    """Routes that test the middleware: they echo, fail, stream and wait."""
    app = FastAPI()
    app.state.service = service
    app.include_router(health.router)

    @app.get("/")
    async def index() -> Response:
        return Response("page")

    @app.post("/v1/echo/{name}")
    async def echo(name: str, request: HttpRequest) -> Response:
        context = context_of(request.scope)
        context.model, context.tokens = "tiny", 5
        context.details["finish_reasons"] = ["stop"]
        body = await request.body()
        context.texts["prompt"] = body.decode()
        return JSONResponse({"client": context.client, "priority": context.priority, "bytes": len(body), "name": name})

    @app.post("/v1/fail")
    async def fail() -> Response:
        raise RuntimeError("a bug")

    @app.post("/v1/cut")
    async def cut() -> Response:
        async def pieces() -> AsyncIterator[bytes]:
            yield b"begun"
            raise RuntimeError("a bug amid a stream")

        return StreamingResponse(pieces())

    @app.post("/v1/wait")
    async def wait() -> Response:
        """Answer once a test says so, or with an error once the engine is closed."""
        app.state.waiting.release()
        while not app.state.go_on.is_set():
            if not service.engine.alive(1):
                raise ApiError(503, "The engine is closed.")
            await asyncio.sleep(0.01)
        return JSONResponse({"waited": True})

    @app.get("/go-on")
    async def go_on() -> Response:
        app.state.go_on.set()
        return Response()

    @app.get("/waiting")
    async def waiting() -> Response:
        return JSONResponse({"waiting": app.state.waiting.acquire(blocking=False)})

    @app.post("/v1/until-gone")
    async def until_gone(request: HttpRequest) -> Response:
        """Wait until the client closes its connection, then try to answer."""
        await request.body()
        app.state.waiting.release()
        while (await request.receive())["type"] != "http.disconnect":
            pass
        app.state.gone.release()
        return Response()

    @app.post("/v1/flood")
    async def flood() -> Response:
        async def pieces() -> AsyncIterator[bytes]:
            for _ in range(1000):
                yield b"x" * 100_000

        return StreamingResponse(pieces())

    @app.post("/v1/halves")
    async def halves() -> Response:
        """Stream half of a body, and the other half once a test says so."""

        async def pieces() -> AsyncIterator[bytes]:
            yield b"first,"
            app.state.waiting.release()
            while not app.state.go_on.is_set():
                await asyncio.sleep(0.01)
            yield b"second"

        return StreamingResponse(pieces())

    @app.post("/v1/until-full")
    async def until_full() -> Response:
        """Stream a body that ends where the client does not read and the system's buffers are full."""

        async def pieces() -> AsyncIterator[bytes]:
            while not any(connection.transport.get_write_buffer_size() for connection in app.state.connections):
                yield b"x" * 4096

        return StreamingResponse(pieces())

    app.state.waiting, app.state.gone, app.state.go_on = threading.Semaphore(0), threading.Semaphore(0), threading.Event()
    install_handlers(app)
    install(app, service)
    return app


class Live:
    """A server that runs on a thread."""

    def __init__(self, service: Service) -> None:
        self.service, self.app = service, make_app(service)
        self.server = Server(self.app, service)
        self.app.state.connections = self.server.server_state.connections
        sockets = bind(service.options)
        self.address: Any = sockets[0].getsockname() if sockets else str(service.options.uds)
        self.thread = threading.Thread(target=self.server.run, args=(sockets,))

    def call(self, function: Callable[[], Any]) -> None:
        """Run a function on the server's loop."""
        assert self.loop is not None
        self.loop.call_soon_threadsafe(function)

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        return self.server.servers[0].get_loop() if self.server.started else None

    def connect(self) -> socket.socket:
        family = socket.AF_UNIX if isinstance(self.address, str) else socket.AF_INET
        connection = socket.socket(family, socket.SOCK_STREAM)
        connection.settimeout(WAIT_S)
        connection.connect(self.address)
        return connection

    def client(self, **arguments: Any) -> httpx.Client:
        url = f"http://127.0.0.1:{self.address[1]}"
        return httpx.Client(base_url=url, timeout=WAIT_S, trust_env=False, **arguments)


@contextlib.contextmanager
def live(service: Service | None = None, **options: Any) -> Iterator[Live]:
    """A running server with these options, ended and closed at the end of the block."""
    running = Live(service or make_service(**{"port": 0} | options))
    running.thread.start()
    try:
        wait_until(lambda: running.server.started or not running.thread.is_alive())
        yield running
    finally:
        running.app.state.go_on.set()
        running.server.should_exit = True
        running.thread.join(WAIT_S)
        running.service.close()
        running.service.engine.close()
    assert not running.thread.is_alive()


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds; fails after `WAIT_S`."""
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, "waited for too long"
        time.sleep(0.005)


def read_all(connection: socket.socket) -> bytes:
    """All that arrives until the other side closes."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            data += piece
    return data


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path
