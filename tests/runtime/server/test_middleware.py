"""What happens to each request around its route."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from belle_compile.runtime.server.context import context_of
from belle_compile.runtime.server.middleware import ACCEPTED, Observer
from belle_compile.runtime.server.options import ServerOptions
from belle_compile.runtime.server.service import Service
from tests.runtime.server.live import live, make_app, make_service, write
from tests.runtime.server.serving import post, run, serving

KEYS = """
[[keys]]
name = "ann"
key = "sk-ann"
priority = -3
tokens_per_minute = 5

[[keys]]
name = "bob"
key = "sk-bob"
max_concurrent = 1
"""
ANN, BOB = ({"Authorization": f"Bearer sk-{name}"} for name in ("ann", "bob"))


@pytest.fixture(name="serve")
def _serve() -> Iterator[Any]:
    services: list[Service] = []

    def serve(**options: Any) -> Service:
        services.append(make_service(**options))
        return services[-1]

    yield serve
    for service in services:
        service.close()
        service.engine.close()


def ask(service: Service, method: str, path: str, **arguments: Any) -> httpx.Response:
    """The response to one request, without a network."""

    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(make_app(service), client=("192.0.2.7", 1234))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **arguments)

    return asyncio.run(run())


def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """The fields of the requests that were logged."""
    return [getattr(record, "fields") for record in caplog.records if record.getMessage() == "request"]  # noqa: B009


def test_a_sane_request_id_is_kept_and_others_are_made(serve: Any) -> None:
    service = serve()
    assert ask(service, "GET", "/", headers={"X-Request-Id": "a-1.b:c_2"}).headers["x-request-id"] == "a-1.b:c_2"
    made = {
        ask(service, "GET", "/", headers={"X-Request-Id": id}).headers["x-request-id"] for id in ("", "a b", "x" * 129, 'a"')
    }
    assert len(made) == 4 and all(len(id) == 32 for id in made)
    assert ask(service, "GET", "/nowhere").headers["x-request-id"]


def test_requests_are_logged(serve: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    service = serve(api_keys=("sk-1",))
    headers = {"Authorization": "Bearer sk-1", "X-Request-Id": "id-1"}
    assert ask(service, "POST", "/v1/echo/a?secret=1", headers=headers, content=b"my diary").status_code == 200
    (line,) = lines(caplog)
    assert line.pop("duration_s") >= line.pop("first_byte_s") > 0
    assert line == {
        "method": "POST", "path": "/v1/echo/a", "route": "/v1/echo/{name}", "status": 200, "complete": True,
        "client": "192.0.2.7", "key": "api-key-1", "model": "tiny", "tokens": 5, "finish_reasons": ["stop"],
    }  # fmt: skip
    assert "sk-1" not in caplog.text and "diary" not in caplog.text


def test_prompts_are_logged_if_asked_for(serve: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    ask(serve(log_prompts=True), "POST", "/v1/echo/a", content=b"my diary")
    assert lines(caplog)[0]["prompt"] == "my diary"


@pytest.mark.parametrize("stream", [False, True])
def test_what_an_answer_used_is_logged(stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    body = {"prompt": "hello", "max_tokens": 3, "ignore_eos": True, "seed": 1, "stream": stream}
    with serving(options=ServerOptions(log_prompts=True)) as service:
        assert post(service, "/v1/completions", body).status_code == 200
        assert 'handler="/v1/completions",method="POST",status="200"' in service.metrics.exposition().decode()
    (line,) = lines(caplog)
    assert line["route"] == "/v1/completions" and line["model"] == "tiny" and line["result_cache"] == "miss"
    assert line["completion_tokens"] == 3 and line["tokens"] == line["prompt_tokens"] + 3
    assert line["finish_reasons"] == ["length"] and line["prompts"] == ["hello"] and len(line["answers"]) == 1


def test_probes_are_logged_only_when_they_fail(serve: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    service = serve()
    service.current.ready = True
    ask(service, "GET", "/ready")
    assert lines(caplog) == []
    service.draining = True
    ask(service, "GET", "/ready")
    assert lines(caplog)[0]["status"] == 503
    assert [record.levelname for record in caplog.records if record.message == "request"] == ["WARNING"]


def test_statistics_that_the_page_asks_for_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with serving() as service:
        assert run(service, lambda client: client.get("/stats")).status_code == 200
        assert lines(caplog) == []
        assert run(service, lambda client: client.get("/info")).status_code == 200
    assert [line["route"] for line in lines(caplog)] == ["/info"]


def test_no_request_is_logged_without_access_log(serve: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    ask(serve(access_log=False), "GET", "/")
    assert lines(caplog) == []


def test_a_bug_is_an_error_object_and_a_log_with_the_reason(serve: Any, caplog: pytest.LogCaptureFixture) -> None:
    service = serve()
    response = ask(service, "POST", "/v1/fail")
    assert response.status_code == 500 and error_of(response)["code"] == "internal_error" and "bug" not in response.text
    assert response.headers["x-request-id"] and "RuntimeError: a bug" in caplog.text
    assert 'handler="/v1/fail",method="POST",status="500"' in service.metrics.exposition().decode()


def test_a_bug_amid_a_response_cuts_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with live() as running, running.client() as client, pytest.raises(httpx.RemoteProtocolError):
        client.post("/v1/cut")
    assert lines(caplog)[-1]["complete"] is False and caplog.text.count("RuntimeError: a bug amid a stream") == 1


def test_a_key_is_needed_where_there_are_keys(serve: Any, tmp_path: Path) -> None:
    service = serve(api_keys=("sk-1",), api_key_file=write(tmp_path / "keys.toml", KEYS))
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "sk-1"}):
        response = ask(service, "POST", "/v1/echo/a", headers=headers)
        assert response.status_code == 401 and response.headers["www-authenticate"].startswith("Bearer")
        assert error_of(response)["code"] == "invalid_api_key" and "wrong" not in response.text
    assert ask(service, "GET", "/v1/models").status_code == 401, "before anything is said about the path"
    assert ask(service, "POST", "/v1/echo/a", headers=ANN).json() == {"client": "ann", "priority": -3, "bytes": 0, "name": "a"}


def test_what_is_open(serve: Any) -> None:
    service = serve(api_keys=("sk-1",))
    service.current.ready = True
    assert [ask(service, "GET", path).status_code for path in ("/", "/ready", "/page/absent.js")] == [200, 200, 404]
    assert ask(service, "GET", "/metrics").status_code == 200
    guarded = serve(api_keys=("sk-1",), metrics_auth=True)
    assert ask(guarded, "GET", "/metrics").status_code == 401
    assert ask(guarded, "GET", "/metrics", headers={"Authorization": "Bearer sk-1"}).status_code == 200


def test_without_keys_everything_is_open(serve: Any) -> None:
    assert ask(serve(), "POST", "/v1/echo/a", headers={"Authorization": "Bearer any"}).json()["client"] == ""


def test_limits_of_a_key(serve: Any, tmp_path: Path) -> None:
    service = serve(api_key_file=write(tmp_path / "keys.toml", KEYS))
    assert ask(service, "POST", "/v1/echo/a", headers=ANN).status_code == 200  # uses the five tokens of the minute
    response = ask(service, "POST", "/v1/echo/a", headers=ANN)
    assert response.status_code == 429 and error_of(response)["code"] == "rate_limit_exceeded"
    assert 1 <= int(response.headers["retry-after"]) <= 12
    assert ask(service, "POST", "/v1/fail", headers=BOB).status_code == 500
    assert ask(service, "POST", "/v1/echo/a", headers=BOB).status_code == 200, "a request that failed has left"


def test_a_large_body_is_refused_unread(serve: Any) -> None:
    service = serve(max_body_bytes=10)
    assert ask(service, "POST", "/v1/echo/a", content=b"x" * 10).json()["bytes"] == 10
    response = ask(service, "POST", "/v1/echo/a", content=b"x" * 11)
    assert response.status_code == 413 and error_of(response)["message"] == "The body is too large: expected at most 10 bytes."


def test_a_large_body_in_chunks_is_read_up_to_the_limit(serve: Any) -> None:
    sent: list[int] = []

    async def endless() -> AsyncIterator[bytes]:
        for number in range(1000):
            sent.append(number)
            yield b"12345"

    response = ask(serve(max_body_bytes=10), "POST", "/v1/echo/a", content=endless())
    assert response.status_code == 413 and error_of(response)["code"] == "request_too_large" and len(sent) == 3


def test_new_requests_are_refused_while_draining(serve: Any) -> None:
    service = serve()
    service.draining = True
    response = ask(service, "POST", "/v1/echo/a")
    assert response.status_code == 503 and int(response.headers["retry-after"]) > 0 and error_of(response)["code"] == "draining"
    assert ask(service, "GET", "/").status_code == 200


def test_what_arrived_before_draining_is_served(serve: Any) -> None:
    service = serve()
    service.draining = True
    app = make_app(service)

    async def arrived_before(scope: Scope, receive: Receive, send: Send) -> None:
        await app(scope | {"state": {ACCEPTED: True}}, receive, send)

    async def run() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(arrived_before), base_url="http://test") as client:
            return await client.post("/v1/echo/a")

    assert asyncio.run(run()).status_code == 200


def test_no_origin_may_call_by_default(serve: Any) -> None:
    response = ask(serve(), "GET", "/", headers={"Origin": "https://a.example"})
    assert "access-control-allow-origin" not in response.headers


def test_allowed_origins_may_call_and_see_errors(serve: Any) -> None:
    service = serve(allowed_origins=("https://a.example",), api_keys=("sk-1",))
    headers = {
        "Origin": "https://a.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    assert ask(service, "OPTIONS", "/v1/echo/a", headers=headers).status_code == 200
    refused = ask(service, "POST", "/v1/echo/a", headers={"Origin": "https://a.example"})
    assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == "https://a.example"
    assert "access-control-allow-origin" not in ask(service, "GET", "/", headers={"Origin": "https://b.example"}).headers


class FakeSpan:
    def __init__(self) -> None:
        self.name, self.attributes, self.failed = "", dict[str, Any](), False

    def __enter__(self) -> FakeSpan:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update_name(self, name: str) -> None:
        self.name = name

    def set_attribute(self, name: str, value: Any) -> None:
        self.attributes[name] = value

    def set_status(self, status: Any) -> None:
        self.failed = True


class FakeTracer:
    def __init__(self) -> None:
        self.spans: list[FakeSpan] = []
        self.parents: list[Any] = []

    def start_as_current_span(self, name: str, parent: Any, kind: Any) -> FakeSpan:
        self.spans.append(FakeSpan())
        self.parents.append(parent)
        return self.spans[-1]


def test_a_request_is_a_span(serve: Any) -> None:
    trace = pytest.importorskip("opentelemetry.trace")
    tracer, service = FakeTracer(), serve()

    class Route:
        path = "/v1/chat/completions"

    async def chat(scope: Scope, receive: Receive, send: Send) -> None:
        scope["route"] = Route
        context = context_of(scope)
        context.model = "tiny"
        context.details |= {"prompt_tokens": 7, "completion_tokens": 3, "finish_reasons": ["stop"]}
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps({}).encode()})

    async def run() -> None:
        transport = httpx.ASGITransport(Observer(chat, service, tracer))  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            await client.post("/v1/chat/completions", headers={"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"})

    asyncio.run(run())
    (span,) = tracer.spans
    assert span.name == "chat tiny" and not span.failed
    expected = {
        "gen_ai.operation.name": "chat", "gen_ai.request.model": "tiny", "gen_ai.usage.input_tokens": 7,
        "gen_ai.usage.output_tokens": 3, "gen_ai.response.finish_reasons": ["stop"], "http.response.status_code": 200,
    }  # fmt: skip
    assert expected.items() <= span.attributes.items()
    assert trace.get_current_span(tracer.parents[0]).get_span_context().trace_id == int("a" * 32, 16)
