"""Replacing the engine of a running server: no request notices, and what goes wrong leaves the engine as it was."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from belle_compile.runtime.artifact import Requirements, TargetInfo, read_manifest
from belle_compile.runtime.engine import Engine
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.selftest import SelfTest
from belle_compile.runtime.server.app import create_app
from belle_compile.runtime.server.options import ServerOptions
from belle_compile.runtime.server.serve import Server
from belle_compile.runtime.server.service import Service
from tests.runtime.fakes import FakeExecutor, hash_rule, make_directory, make_engine, manifest
from tests.runtime.server.live import passing
from tests.runtime.server.serving import CHAT, WAIT_S, make_executor

ADMIN = {"Authorization": "Bearer root"}
OPTIONS = ServerOptions(admin_key="root", api_keys=("client",))
CLIENT = {"Authorization": "Bearer client"}
LONG = {"messages": CHAT, "seed": 3, "max_tokens": 24}


class Gate(FakeExecutor):
    """An executor whose steps wait until the gate is opened."""

    def __init__(self, **limits: int) -> None:
        super().__init__(**limits)
        self.open = threading.Event()

    def step(self, batch: Any) -> NDArray[np.float32]:
        assert self.open.wait(WAIT_S)
        return super().step(batch)


def other_rule(context: list[int]) -> NDArray[np.float32]:
    """The rule of another model."""
    return hash_rule([7, *context])


def load_other(directory: Path, *, kv_cache_bytes: int, max_loras: int | None) -> Engine:
    """Another engine, with the manifest of a directory."""
    read = read_manifest(directory)
    engine = make_engine(_other_executor(), model=read.model, files=read.files)
    engine.self_test = passing  # type: ignore[method-assign]
    return engine


def _other_executor() -> FakeExecutor:
    executor = make_executor()
    executor.rule = other_rule
    return executor


def directory_of(path: Path, name: str, **changes: Any) -> Path:
    model = manifest().model
    return make_directory(path, {"name": name.encode()}, model=type(model)(model.family, name, 1, {}, {}), **changes)


@contextlib.contextmanager
def serving(executor: FakeExecutor, load: Any = load_other, directory: Path | None = None) -> Iterator[Service]:
    with make_engine(executor) as engine:
        engine.self_test = passing  # type: ignore[method-assign]
        service = Service(engine, OPTIONS, directory=directory, load=load)
        try:
            yield service
        finally:
            if isinstance(executor, Gate):
                executor.open.set()
            service.close()
            service.swap.close()


def run(service: Service, use: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
    @contextlib.asynccontextmanager
    async def client() -> AsyncIterator[httpx.AsyncClient]:
        transport = httpx.ASGITransport(create_app(service), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=WAIT_S) as opened:
            yield opened

    async def main() -> None:
        async with client() as opened:
            await asyncio.wait_for(_use(opened), WAIT_S)

    async def _use(opened: httpx.AsyncClient) -> None:
        await use(opened)

    asyncio.run(main())


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(int(WAIT_S / 0.005)):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it never happened")


async def ask(client: httpx.AsyncClient, **fields: Any) -> Any:
    response = await client.post("/v1/chat/completions", json=LONG | fields, headers=CLIENT)
    assert response.status_code == 200, response.text
    return response.json()


def text_of(executor: FakeExecutor) -> str:
    """The answer that an engine gives alone."""
    texts: list[str] = []

    async def use(client: httpx.AsyncClient) -> None:
        texts.append((await ask(client))["choices"][0]["message"]["content"])

    with serving(executor) as service:
        run(service, use)
    return texts[0]


def test_requests_under_way_end_with_the_engine_that_they_began_with(tmp_path: Path) -> None:
    old, place = Gate(num_blocks=128), directory_of(tmp_path / "next", "next")
    texts = text_of(make_executor()), text_of(_other_executor())
    assert texts[0] != texts[1]
    with serving(old) as service:

        async def use(client: httpx.AsyncClient) -> None:
            waiting = asyncio.create_task(ask(client))
            await until(lambda: service.engine.stats().running + service.engine.stats().waiting == 1)
            response = await client.post("/admin/engine", json={"path": str(place)}, headers=ADMIN)
            state = response.json()
            assert response.status_code == 200 and state["current"]["model"] == "next", response.text
            assert state["current"]["self_test"] == "passed" and state["current"]["directory"] == str(place)
            assert state["previous"]["model"] == "tiny" and state["previous"]["requests"] >= 1 and state["loading"] is None

            answer = await ask(client)
            assert (answer["model"], answer["choices"][0]["message"]["content"]) == ("next", texts[1])
            assert not old.closed and not waiting.done()
            again = await client.post("/admin/engine", json={"path": str(place)}, headers=ADMIN)
            assert again.status_code == 409 and "requests that the engine before still answers" in again.text
            old.open.set()
            ended = await waiting
            assert (ended["model"], ended["choices"][0]["message"]["content"]) == ("tiny", texts[0])
            await until(lambda: service.swap.state["previous"] is None)
            assert old.closed
            metrics = (await client.get("/metrics", headers=CLIENT)).text
            assert 'belle:generation_tokens_total{engine="0",model_name="next"} 48.0' in metrics
            assert 'belle:request_success_total{engine="0",finished_reason="length",model_name="next"} 2.0' in metrics
            assert (await client.get("/stats", headers=CLIENT)).json()["generated_tokens"] == 48

        run(service, use)
        assert service.engine.manifest.model.name == "next"
    assert not service.engine.alive(0)  # the engine that replaced it is closed with the server


def test_nothing_is_left_of_an_engine_that_was_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trimmed: list[None] = []
    monkeypatch.setattr("belle_compile.runtime.server.engine_swap.trim_heap", lambda: trimmed.append(None))
    places = [directory_of(tmp_path / name, name) for name in ("one", "two")]
    with serving(make_executor()) as service:

        async def use(client: httpx.AsyncClient) -> None:
            await client.post("/admin/engine", json={"path": str(places[0])}, headers=ADMIN)
            await ask(client)
            await until(lambda: service.swap.state["previous"] is None)
            replaced = weakref.ref(service.engine)
            gc.freeze()  # as a server does once it has begun
            await client.post("/admin/engine", json={"path": str(places[1])}, headers=ADMIN)
            assert (await ask(client))["model"] == "two"
            await until(lambda: service.swap.state["previous"] is None)
            await until(lambda: replaced() is None)
            await until(lambda: len(trimmed) == 2)

        run(service, use)
    gc.unfreeze()


def test_a_stream_that_has_begun_ends_with_its_engine(tmp_path: Path) -> None:
    old, place = Gate(num_blocks=128), directory_of(tmp_path / "next", "next")
    wanted = text_of(make_executor())
    with serving(old) as service:

        async def use(client: httpx.AsyncClient) -> None:
            streaming = asyncio.create_task(client.post("/v1/chat/completions", json=LONG | {"stream": True}, headers=CLIENT))
            await until(lambda: service.engine.stats().running + service.engine.stats().waiting == 1)
            assert (await client.post("/admin/engine", json={"path": str(place)}, headers=ADMIN)).status_code == 200
            old.open.set()
            lines = [line.removeprefix("data: ") for line in (await streaming).text.splitlines() if line]
            assert lines.pop() == "[DONE]"
            pieces = [httpx.Response(200, text=line).json()["choices"][0]["delta"].get("content", "") for line in lines]
            assert "".join(pieces) == wanted

        run(service, use)


@pytest.mark.parametrize(
    ("headers", "status"), [({}, 401), (CLIENT, 401), ({"Authorization": "Basic root"}, 401), (ADMIN, 200)]
)
def test_only_the_administrators_key_opens_the_route(headers: dict[str, str], status: int) -> None:
    with serving(make_executor()) as service:

        async def use(client: httpx.AsyncClient) -> None:
            assert (await client.get("/admin/engine", headers=headers)).status_code == status
            assert (await client.get("/v1/models", headers=ADMIN)).status_code == 401  # it opens nothing else

        run(service, use)


def test_without_an_administrators_key_the_route_is_closed() -> None:
    with make_engine() as engine:
        service = Service(engine, ServerOptions(), load=load_other)

        async def use(client: httpx.AsyncClient) -> None:
            response = await client.post("/admin/engine", json={"path": "x"})
            assert response.status_code == 403 and "--admin-key" in response.text

        run(service, use)
        service.close()


def test_a_key_of_clients_is_not_one_of_administrators() -> None:
    with make_engine() as engine, pytest.raises(EngineError, match="the key of 'admin': found another key with the same"):
        Service(engine, ServerOptions(admin_key="k", api_keys=("k",)))


def failing(directory: Path, *, kv_cache_bytes: int, max_loras: int | None) -> Engine:
    engine = load_other(directory, kv_cache_bytes=kv_cache_bytes, max_loras=max_loras)

    def fail() -> SelfTest:
        raise EngineError("self-test", "the answer to prompt 0 differs", found="token 5", expected="token 6")

    engine.self_test = fail  # type: ignore[method-assign]
    return engine


HUGE = TargetInfo("cpu", "tvm", ("avx2",), Requirements("x86_64", ("avx2",), 1 << 60))


@pytest.mark.parametrize(
    ("changes", "load", "message"),
    [
        (None, load_other, "is not an engine: found nothing there"),
        ({}, failing, "fails its self-test: found self-test: the answer to prompt 0 differs: found token 5, expected token 6."),
        ({}, None, "an engine of several ranks cannot be replaced; start a server of the new engine and drain this one."),
        ({"target": HUGE}, load_other, "of which 0.0 are for another engine and the KV caches"),
    ],
)
def test_what_cannot_replace_the_engine_leaves_it_as_it_was(
    changes: dict[str, Any] | None, load: Any, message: str, tmp_path: Path
) -> None:
    place = tmp_path / "none" if changes is None else directory_of(tmp_path / "next", "next", **changes)
    with serving(make_executor(), load) as service:
        before = service.engine

        async def use(client: httpx.AsyncClient) -> None:
            response = await client.post("/admin/engine", json={"path": str(place)}, headers=ADMIN)
            error = response.json()["error"]
            assert response.status_code == 400 and message in error["message"], error
            assert error["message"].count("\n") == 0 and (error["param"], error["code"]) == ("path", "engine_not_replaced")
            state = (await client.get("/admin/engine", headers=ADMIN)).json()
            assert state["loading"] is None and state["previous"] is None and state["current"]["model"] == "tiny"
            assert state["error"] is None if load is None else message in state["error"]
            assert (await ask(client))["model"] == "tiny"

        run(service, use)
        assert service.engine is before


def test_a_client_that_does_not_wait_stops_nothing(tmp_path: Path) -> None:
    place, loading, go_on = directory_of(tmp_path / "next", "next"), threading.Event(), threading.Event()

    def slowly(directory: Path, **arguments: Any) -> Engine:
        loading.set()
        assert go_on.wait(WAIT_S)
        return load_other(directory, **arguments)

    with serving(make_executor(), slowly) as service:

        async def use(client: httpx.AsyncClient) -> None:
            posting = asyncio.create_task(client.post("/admin/engine", json={"path": str(place)}, headers=ADMIN))
            await until(loading.is_set)
            posting.cancel()
            state = (await client.get("/admin/engine", headers=ADMIN)).json()
            assert state["loading"] == str(place)
            again = await client.post("/admin/engine", json={"path": str(place)}, headers=ADMIN)
            assert again.status_code == 409 and "is being loaded" in again.text
            go_on.set()
            await until(lambda: service.engine.manifest.model.name == "next")

        run(service, use)


def test_a_signal_serves_what_the_engines_directory_holds_now(tmp_path: Path) -> None:
    link = tmp_path / "current"
    link.symlink_to(directory_of(tmp_path / "one", "one"))
    with serving(make_executor(), directory=link) as service:
        first = service.engine
        first.identity = replace(first.identity, digest=read_manifest(link).digest)  # as if it had been loaded from there

        async def use(client: httpx.AsyncClient) -> None:
            server = Server(create_app(service), service)
            server.reload()
            await asyncio.gather(*server._tasks)
            assert service.engine is first  # nothing has changed
            link.unlink()
            link.symlink_to(directory_of(tmp_path / "two", "two"))
            server.reload()
            await asyncio.gather(*server._tasks)
            assert (await ask(client))["model"] == "two"
            link.unlink()
            server.reload()
            await asyncio.gather(*server._tasks)
            assert (await ask(client))["model"] == "two"  # what cannot be read leaves the engine as it was

        run(service, use)
