"""Serving an engine without kernels: in this process, with and without a socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, TypeVar

import httpx
import uvicorn
from fastapi import FastAPI

from belle_compile.runtime.server.app import create_app
from belle_compile.runtime.server.options import ServerOptions
from belle_compile.runtime.server.service import Service
from belle_compile.runtime.serving.result_cache.options import ResultCacheOptions
from tests.runtime.fakes import FakeExecutor, make_engine

T = TypeVar("T")
_APPS: weakref.WeakKeyDictionary[Service, FastAPI] = weakref.WeakKeyDictionary()

WAIT_S = 20  # what never happens in a test that passes
CHAT = [{"role": "user", "content": "hello"}]
GREEDY = {"temperature": 0, "repetition_penalty": 1}


def make_executor(**limits: int) -> FakeExecutor:
    return FakeExecutor(**{"num_blocks": 128, "max_sequences": 16, "max_rows": 32, "max_tokens": 64} | limits)


@contextlib.contextmanager
def serving(
    executor: FakeExecutor | None = None, options: ServerOptions | None = None, *, cache: bool = True, **changes: Any
) -> Iterator[Service]:
    """A service of an engine whose answers are random and never end by themselves."""
    results = ResultCacheOptions() if cache else None
    with make_engine(executor or make_executor(), results, **changes) as engine:
        service = Service(engine, options or ServerOptions())
        try:
            yield service
        finally:
            service.close()


@contextlib.asynccontextmanager
async def client_of(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    if service not in _APPS:
        _APPS[service] = create_app(service)
    transport = httpx.ASGITransport(_APPS[service], raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


def run(service: Service, use: Callable[[httpx.AsyncClient], Awaitable[T]]) -> T:
    """Use a client that calls the application without a socket."""

    async def main() -> T:
        async with client_of(service) as client:
            return await asyncio.wait_for(_awaited(use(client)), WAIT_S)

    return asyncio.run(main())


async def _awaited(awaitable: Awaitable[T]) -> T:
    return await awaitable


def post(service: Service, path: str, body: Any, **headers: str) -> httpx.Response:
    """Post JSON; a body of bytes is sent as it is."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent = {"content-type": "application/json"} | headers
    return run(service, lambda client: client.post(path, content=content, headers=sent))


def chat(service: Service, **fields: Any) -> Any:
    response = post(service, "/v1/chat/completions", {"messages": CHAT} | fields)
    assert response.status_code == 200, response.text
    return response.json()


def complete(service: Service, **fields: Any) -> Any:
    response = post(service, "/v1/completions", {"prompt": "hello"} | fields)
    assert response.status_code == 200, response.text
    return response.json()


def stream(service: Service, path: str, **fields: Any) -> list[Any]:
    """The data of a stream's events, which must end with [DONE]."""
    body = ({"messages": CHAT} if "chat" in path else {"prompt": "hello"}) | {"stream": True} | fields
    response = post(service, path, body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    events = events_of(response.text)
    assert events.pop() == "[DONE]"
    return events


def events_of(text: str) -> list[Any]:
    events = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        assert block.startswith("data: ") and "\n" not in block
        data = block.removeprefix("data: ")
        events.append(data if data == "[DONE]" else json.loads(data))
    return events


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for something that happens on another thread."""
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.002)


@contextlib.contextmanager
def listening(service: Service) -> Iterator[str]:
    """Serve on a port of the system's choice; gives the server's URL."""
    config = uvicorn.Config(create_app(service), host="127.0.0.1", port=0, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(WAIT_S)
        assert not thread.is_alive()
