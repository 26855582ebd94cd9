"""Requests that cannot be answered: each gets an OpenAI error that names the field, and none gets 500."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest

from belle_compile.runtime.server.options import ServerOptions
from belle_compile.runtime.server.service import Service
from tests.runtime.server.serving import CHAT, chat, post, run, serving

MANY = 10_000


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with serving() as service:
        yield service


def error_of(service: Service, path: str, body: Any, status: int = 400) -> dict[str, Any]:
    response = post(service, path, body)
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert error["message"].endswith(".") and len(error["message"]) < 600
    return error


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": ["hello"]}, "messages.0"),
        ({"messages": CHAT * MANY}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [*CHAT, {"role": "tool", "content": "x"}]}, "messages.1.role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "more": 1}]}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "x", "name": "Ann"}]}, "messages.0.name"),
        ({"messages": [{"role": "user", "content": "a\0b"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "hello " * 500}]}, "messages"),
        ({"temperature": "warm"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"n": MANY}, "n"),
        ({"n": 0}, "n"),
        ({"n": True}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"max_completion_tokens": 10**6}, "max_completion_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ({"stop": [str(number) for number in range(MANY)]}, "stop"),
        ({"stop": ["x" * MANY]}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids.0"),
        ({"stop_token_ids": list(range(MANY))}, "stop_token_ids"),
        ({"stop_token_ids": [10**9]}, "stop_token_ids"),
        ({"seed": 2**63}, "seed"),
        ({"seed": -(2**63) - 1}, "seed"),
        ({"seed": "7"}, "seed"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"1": "high"}}, "logit_bias"),
        ({"logit_bias": {str(token): 1 for token in range(MANY)}}, "logit_bias"),
        ({"logit_bias": {"999": 1}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": None, "repetition_penalty": 0}, "repetition_penalty"),
        ({"min_tokens": 100}, "min_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options.continuous_usage_stats"),
        ({"stream": "yes"}, "stream"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": 10**400}, "timeout"),
        ({"priority": 2**40}, "priority"),
        ({"cache_salt": "x" * MANY}, "cache_salt"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_object"}, "regex": "a+"}, "regex"),
        ({"guided_json": 5}, "guided_json"),
        ({"structured_outputs": {"choice": ["a"]}}, "structured_outputs.choice"),
        ({"temprature": 1}, "temprature"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"best_of": 3}, "best_of"),
        ({"model": 5}, "model"),
    ],
)  # fmt: skip
def test_the_field_of_a_chat_is_named(service: Service, fields: dict[str, Any], param: str) -> None:
    error = error_of(service, "/v1/chat/completions", {"messages": CHAT} | fields)
    assert error["param"] == param, error
    assert param in error["message"] or error["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [[1], ["a"]]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [300]}, "prompt"),
        ({"prompt": [10**30]}, "prompt"),
        ({"prompt": [1, 2**63]}, "prompt"),
        ({"prompt": ["a"] * MANY}, "prompt"),
        ({"prompt": ["a"] * 500, "n": 128}, "n"),
        ({"suffix": "end"}, "suffix"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"messages": CHAT}, "messages"),
        ({"echo": 1}, "echo"),
    ],
)
def test_the_field_of_a_completion_is_named(service: Service, fields: dict[str, Any], param: str) -> None:
    error = error_of(service, "/v1/completions", {"prompt": "hello"} | fields)
    assert error["param"] == param and param in error["message"], error


def test_a_prompt_one_token_too_long(service: Service) -> None:
    most = service.engine.max_context
    assert post(service, "/v1/completions", {"prompt": [5] * (most - 1), "max_tokens": 1}).status_code == 200
    error = error_of(service, "/v1/completions", {"prompt": [5] * most})
    assert error["code"] == "context_length_exceeded" and error["param"] == "prompt"
    assert error["message"].startswith(
        f"This model's maximum context length is {most} tokens. However, you requested {most + 1}"
    )
    error = error_of(service, "/v1/completions", {"prompt": [5] * (most - 1), "max_tokens": 2})
    assert error["code"] == "context_length_exceeded" and error["param"] == "max_tokens"


@pytest.mark.parametrize(
    ("body", "param", "reason"),
    [
        (b"", None, "it is empty"),
        (b"{", None, "at line 1, column 2"),
        (b"[1]", None, "expected an object, found a list"),
        (b"\xff{}", None, "it is not UTF-8 at byte 0"),
        (b'{"prompt": "\x01"}', None, "invalid control character at line 1"),
        (b"[" * 100_000, None, "nested too deeply"),
        (b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}", "prompt", "expected"),
        (b'{"guided_json": ' + b'{"a":' * 900 + b"1" + b"}" * 900 + b', "prompt": "x", "n": 0}', None, ""),
        (b'{"prompt": "a", "prompt": "b"}', "prompt", "given twice"),
        (b'{"prompt": "a", "logit_bias": {"1": 1, "1": 2}}', "1", "given twice"),
        (b'{"prompt": "\\ud800"}', "prompt", "surrogate"),
        (b'{"prompt": ["x", "\\u0000"]}', "prompt.1", "NUL"),
        (b'{"prompt": "x", "\\u0000": 1}', None, "a key has a NUL"),
        (b'{"prompt": "x", "temperature": NaN}', "temperature", "finite"),
        (b'{"prompt": "x", "temperature": -Infinity}', "temperature", "finite"),
        (b'{"prompt": "x", "temperature": 1e999}', "temperature", "finite"),
        (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", "seed", "finite"),
        (b'{"prompt": [' + b"9" * 5000 + b"]}", "prompt.0", "finite"),
        (b'{"prompt": "x", "guided_json": {"minimum": 1e999}}', "guided_json.minimum", "finite"),
    ],
)
def test_json_that_is_refused(service: Service, body: bytes, param: str | None, reason: str) -> None:
    error = error_of(service, "/v1/completions", body)
    assert error["param"] == param or not reason
    assert reason in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [1] * 500_000},
        {"messages": [{}] * 200_000},
        {"messages": CHAT} | {f"k{number}": 1 for number in range(100_000)},
        {"messages": [{"role": "user", "content": "x"} | {f"k{number}": 1 for number in range(100_000)}]},
    ],
)
def test_a_body_that_is_wrong_everywhere_takes_no_memory(service: Service, body: Any) -> None:
    data = json.dumps(body).encode()
    tracemalloc.start()
    error_of(service, "/v1/chat/completions", data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40 * len(data)


def test_escapes_that_are_characters_pass(service: Service) -> None:
    body = b'{"prompt": "\\ud83d\\ude00 \\\\u0000 \\\\ud800 NaN 1e999", "max_tokens": 1}'
    assert post(service, "/v1/completions", body).status_code == 200


@pytest.mark.parametrize("sent", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"])
def test_the_body_must_be_sent_as_json(service: Service, sent: str) -> None:
    body = json.dumps({"prompt": "x"}).encode()
    response = post(service, "/v1/completions", body, **{"content-type": sent})
    assert response.status_code == 400 and response.json()["error"]["code"] == "invalid_content_type"
    assert post(service, "/v1/completions", body, **{"content-type": "Application/JSON; charset=utf-8"}).status_code == 200


def test_limits_of_the_options() -> None:
    with serving(options=ServerOptions(max_messages=2, max_prompts=2, max_n=2)) as service:
        for path, body, param in (
            ("/v1/chat/completions", {"messages": CHAT * 3}, "messages"),
            ("/v1/completions", {"prompt": ["a", "b", "c"]}, "prompt"),
            ("/v1/completions", {"prompt": "a", "n": 3}, "n"),
            ("/tokenize", {"messages": CHAT * 3}, "messages"),
        ):
            error = error_of(service, path, body)
            assert error["param"] == param and "at most 2" in error["message"]


def test_a_template_that_refuses_the_messages() -> None:
    from belle_compile.runtime.artifact import PromptTemplate

    template = PromptTemplate("strict", "{{ raise_exception('no system messages') }}", "<s>", "</s>")
    with serving(prompt_template=template) as service:
        error = error_of(service, "/v1/chat/completions", {"messages": CHAT})
        assert error["param"] == "messages" and "no system messages" in error["message"]


@pytest.mark.parametrize(("path", "body"), [("/tokenize", {}), ("/tokenize", {"prompt": "a", "messages": CHAT}),
                                            ("/detokenize", {"tokens": [300]}), ("/detokenize", {"tokens": "x"}),
                                            ("/detokenize", {}), ("/detokenize", {"tokens": [-1]})])  # fmt: skip
def test_bad_requests_to_the_tokenizer(service: Service, path: str, body: Any) -> None:
    assert error_of(service, path, body)["param"]


def test_unknown_paths_and_methods(service: Service) -> None:
    for path in ("/v1/nothing", "/v1/chat/completions/", "/docs", "/redoc"):
        response = run(service, lambda client, path=path: client.get(path))  # type: ignore[misc]
        assert response.status_code == 404 and response.json()["error"]["code"] == "unknown_url"
    response = run(service, lambda client: client.get("/v1/completions"))
    assert response.status_code == 405 and response.headers["allow"] == "POST"
    assert response.json()["error"]["code"] == "method_not_allowed"


def test_the_service_goes_on(service: Service) -> None:
    assert chat(service)["choices"]
