"""Clients that go, that read slowly, and requests that fail at every point: nobody else notices."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.executors import StepBatch
from belle_compile.runtime.server.app import create_app
from belle_compile.runtime.server.context import RequestContext
from belle_compile.runtime.server.options import ServerOptions
from belle_compile.runtime.server.service import Service
from belle_compile.runtime.serving.generation import Generation
from belle_compile.runtime.serving.scheduling import SchedulerOptions
from belle_compile.runtime.tokenizer import Tokenizer
from tests.runtime.fakes import FakeExecutor
from tests.runtime.server.serving import CHAT, WAIT_S, client_of, events_of, post, run, serving, wait_until

PATH = "/v1/chat/completions"
A_LETTER_A_STEP = {"logit_bias": {"70": 100}}  # pieces of other answers may wait until a character is whole


class SteppedExecutor(FakeExecutor):
    """Runs a step for each permit. `begun` counts those that wait for theirs, too."""

    def __init__(self) -> None:
        super().__init__(num_blocks=128)
        self.permits = threading.Semaphore(0)
        self.begun = 0

    def step(self, batch: StepBatch) -> Any:
        self.begun += 1
        assert self.permits.acquire(timeout=WAIT_S)
        return super().step(batch)


class Connection:
    """A connection to the application without a server between: the client's side is under the test's control."""

    def __init__(self, service: Service, body: dict[str, Any]) -> None:
        self.sent: list[dict[str, Any]] = []
        self.gone = asyncio.Event()
        self.reading = asyncio.Event()
        self.reading.set()
        self.context = RequestContext()
        self._received = False
        self._body = json.dumps(body).encode()
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
            "path": PATH, "raw_path": PATH.encode(), "query_string": b"", "root_path": "", "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2), "headers": [(b"content-type", b"application/json")], "state": {"belle": self.context},
        }  # fmt: skip
        self.task = asyncio.ensure_future(create_app(service)(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if not self._received:
            self._received = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        await self.reading.wait()
        self.sent.append(message)

    @property
    def chunks(self) -> list[bytes]:
        return [message["body"] for message in self.sent if message.get("body")]

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    async def until(self, condition: Callable[[], bool]) -> None:
        for _ in range(WAIT_S * 500):
            if condition():
                return
            await asyncio.sleep(0.002)
        raise AssertionError("it never happened")

    async def leave(self, service: Service, answers: int) -> None:
        """Let the client go, and wait until the application has told the engine of each answer that nobody waits for it."""
        withdraw, withdrawn = service.engine.withdraw, 0

        def counted(generation: Generation) -> None:
            nonlocal withdrawn
            withdraw(generation)
            withdrawn += 1

        service.engine.withdraw = counted  # type: ignore[method-assign]
        self.gone.set()
        await self.until(lambda: withdrawn >= answers)


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_goes_frees_its_blocks_within_a_step(streamed: bool) -> None:
    executor = SteppedExecutor()

    async def main(service: Service) -> None:
        body = {"messages": CHAT, "max_tokens": 100, "stream": streamed, "n": 2, **A_LETTER_A_STEP}
        connection = Connection(service, body)
        executor.permits.release(3)
        await connection.until(lambda: executor.begun == 4)
        if streamed:
            await connection.until(lambda: len(connection.chunks) > 0)
        assert service.engine.stats().running == 2
        await connection.leave(service, answers=2)  # amid the fourth step
        executor.permits.release(1)
        await asyncio.wait_for(connection.task, WAIT_S)
        await connection.until(lambda: service.engine.stats().running == 0)
        assert service.engine.stats().kv_blocks_used == 0 and service.engine.stats().waiting == 0
        assert len(executor.steps) == 4
        assert not any(b"[DONE]" in chunk for chunk in connection.chunks)

    with serving(executor, cache=False) as service:
        asyncio.run(main(service))
        executor.permits.release(1000)


def test_a_client_that_goes_before_the_first_token() -> None:
    executor = SteppedExecutor()

    async def main(service: Service) -> None:
        connection = Connection(service, {"messages": CHAT, "stream": True})
        await connection.until(lambda: service.engine.stats().running + service.engine.stats().waiting > 0)
        await connection.leave(service, answers=1)
        executor.permits.release(1)
        await asyncio.wait_for(connection.task, WAIT_S)
        assert connection.status == 499, "for the log"

    with serving(executor, cache=False) as service:
        asyncio.run(main(service))
        executor.permits.release(1000)


def test_others_get_the_answer_that_a_client_left() -> None:
    executor = SteppedExecutor()
    body = {"messages": CHAT, "seed": 5, "max_tokens": 8, "stream": True}

    async def main(service: Service) -> None:
        first, second = Connection(service, body), Connection(service, body)
        executor.permits.release(2)
        await first.until(lambda: len(executor.steps) == 2)
        await first.leave(service, answers=1)
        executor.permits.release(1000)
        await asyncio.wait_for(asyncio.gather(first.task, second.task), WAIT_S)
        assert b"".join(second.chunks).endswith(b"data: [DONE]\n\n")
        assert len(executor.steps) == 8

    with serving(executor) as service:
        asyncio.run(main(service))


def test_a_slow_reader_holds_up_nobody_and_gets_all_at_once() -> None:
    async def main(service: Service) -> None:
        body = {"messages": CHAT, "seed": 5, "max_tokens": 60, "stream": True}
        slow, quick = Connection(service, body | {"cache_salt": "a"}), Connection(service, body)
        slow.reading.clear()
        await asyncio.wait_for(quick.task, WAIT_S)
        assert not slow.sent
        await slow.until(lambda: service.engine.stats().running == 0)
        slow.reading.set()
        await asyncio.wait_for(slow.task, WAIT_S)
        contents = []
        for connection in (slow, quick):
            events = events_of(b"".join(connection.chunks).decode())
            assert events.pop() == "[DONE]"
            contents.append("".join(event["choices"][0]["delta"].get("content", "") for event in events))
        assert contents[0] == contents[1] and len(slow.chunks) <= 2

    with serving() as service:
        asyncio.run(main(service))


def test_tokens_are_counted_for_the_middleware() -> None:
    async def main(service: Service) -> None:
        for streamed in (True, False):
            connection = Connection(service, {"messages": CHAT, "max_tokens": 5, "n": 2, "stream": streamed})
            await asyncio.wait_for(connection.task, WAIT_S)
            assert connection.context.tokens == len(service.engine.encode(CHAT)) + 10
            assert connection.context.model == "tiny"

    with serving() as service:
        asyncio.run(main(service))


def test_long_prompts_are_encoded_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on, encode = threading.Event(), Tokenizer.encode

    def slow_encode(self: Tokenizer, text: str, **options: Any) -> list[int]:
        if len(text) > 4096:
            assert goes_on.wait(WAIT_S)
        return encode(self, text, **options)

    async def use(client: httpx.AsyncClient) -> None:
        long = asyncio.ensure_future(client.post("/v1/completions", json={"prompt": "hello" * 1000}))
        assert (await client.post("/v1/completions", json={"prompt": "hello"})).status_code == 200
        assert not long.done()
        goes_on.set()
        assert (await long).json()["error"]["code"] == "context_length_exceeded"

    monkeypatch.setattr(Tokenizer, "encode", slow_encode)
    with serving() as service:
        run(service, use)


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert error["type"] != "invalid_request_error"
    return error


@pytest.mark.parametrize("streamed", [True, False])
def test_a_step_that_fails_is_an_error_and_the_next_request_is_served(streamed: bool) -> None:
    executor = FakeExecutor()
    with serving(executor) as service:
        executor.failure = RuntimeError("secret details of the host")
        error = error_of(post(service, PATH, {"messages": CHAT, "stream": streamed}), 500)
        assert error["code"] == "engine_error" and "secret" not in error["message"]
        assert post(service, PATH, {"messages": CHAT, "stream": streamed}).status_code == 200


def test_a_failure_after_the_first_chunk_is_one_event() -> None:
    executor = SteppedExecutor()

    async def main(service: Service) -> None:
        connection = Connection(service, {"messages": CHAT, "max_tokens": 50, "stream": True, "n": 2, **A_LETTER_A_STEP})
        executor.permits.release(3)
        await connection.until(lambda: len(connection.chunks) > 0)
        executor.failure = RuntimeError("broken")
        executor.permits.release(1000)
        await asyncio.wait_for(connection.task, WAIT_S)
        assert connection.status == 200 and connection.sent[-1]["more_body"] is False
        events = events_of(b"".join(connection.chunks).decode())
        assert [event for event in events if "error" in event] == events[-1:]
        assert set(events[-1]["error"]) == {"message", "type", "param", "code"}

    with serving(executor, cache=False) as service:
        asyncio.run(main(service))


@pytest.mark.parametrize("streamed", [True, False])
def test_a_request_whose_time_is_over(streamed: bool) -> None:
    for options, fields in ((ServerOptions(), {"timeout": 1e-6}), (ServerOptions(request_timeout_s=1e-6), {"timeout": 50})):
        with serving(options=options) as service:
            error = error_of(post(service, PATH, {"messages": CHAT, "stream": streamed, **fields}), 408)
            assert error["code"] == "deadline_exceeded" and error["param"] == "timeout"


@pytest.mark.parametrize("streamed", [True, False])
def test_a_full_queue(streamed: bool) -> None:
    executor = SteppedExecutor()

    async def main(service: Service) -> None:
        body = {"messages": CHAT, "max_tokens": 2, "stream": streamed}
        async with client_of(service) as client:
            first = asyncio.ensure_future(client.post(PATH, json=body))
            while service.engine.stats().waiting + service.engine.stats().running < 1:
                await asyncio.sleep(0.002)
            second = await client.post(PATH, json=body | {"n": 4})
            error = error_of(second, 429)
            assert int(second.headers["retry-after"]) >= 1 and error["code"] == "queue_full"
            executor.permits.release(1000)
            assert (await first).status_code == 200

    with serving(executor, cache=False, scheduler=SchedulerOptions(max_num_seqs=1, max_queue=3)) as service:
        asyncio.run(main(service))


@pytest.mark.parametrize("streamed", [True, False])
def test_more_answers_than_an_empty_queue_takes(streamed: bool) -> None:
    with serving(scheduler=SchedulerOptions(max_num_seqs=2, max_queue=1)) as service:
        response = post(service, PATH, {"messages": CHAT, "max_tokens": 2, "n": 4, "stream": streamed})
        error = response.json()["error"]
        assert response.status_code == 400 and "retry-after" not in response.headers
        assert error["param"] == "n" and error["code"] == "too_many_answers" and "at most 3" in error["message"]
        assert post(service, PATH, {"messages": CHAT, "max_tokens": 2, "n": 3, "stream": streamed}).status_code == 200


@pytest.mark.parametrize("streamed", [True, False])
def test_an_engine_that_is_closed(streamed: bool) -> None:
    with serving() as service:
        service.engine.close()
        assert error_of(post(service, PATH, {"messages": CHAT, "stream": streamed}), 503)["code"] == "engine_unavailable"


def test_no_new_requests_while_draining() -> None:
    executor = SteppedExecutor()

    async def main(service: Service) -> None:
        async with client_of(service) as client:
            first = asyncio.ensure_future(client.post(PATH, json={"messages": CHAT}))
            while service.engine.stats().waiting + service.engine.stats().running < 1:
                await asyncio.sleep(0.002)
            service.draining = True
            response = await client.post(PATH, json={"messages": CHAT})
            assert error_of(response, 503)["code"] == "draining" and int(response.headers["retry-after"]) > 0
            executor.permits.release(1000)
            assert (await first).status_code == 200, "accepted before"

    with serving(executor, cache=False) as service:
        asyncio.run(main(service))


def test_logs_name_no_prompt(caplog: pytest.LogCaptureFixture) -> None:
    executor = FakeExecutor()
    with serving(executor) as service:
        executor.failure = RuntimeError("broken")
        post(service, PATH, {"messages": [{"role": "user", "content": "confidential"}]})
        post(service, PATH, {"messages": [{"role": "user", "content": "confidential"}], "temperature": -1})
        wait_until(lambda: "broken" in caplog.text)
    assert "confidential" not in caplog.text


def test_a_tokenizer_that_does_not_work_is_the_servers_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(self: Tokenizer, text: str, **options: Any) -> list[int]:
        raise EngineError("tokenizer", "text cannot be converted")

    monkeypatch.setattr(Tokenizer, "encode", encode)
    with serving() as service:
        for path, body in ((PATH, {"messages": CHAT}), ("/v1/completions", {"prompt": "x"}), ("/tokenize", {"prompt": "x"})):
            assert error_of(post(service, path, body), 500)["code"] == "engine_error"
