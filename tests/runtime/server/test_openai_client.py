"""Clients of OpenAI's API against a server on the loopback interface: `openai`, `litellm` and `langchain-openai`."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from belle_compile.runtime import SamplingParams
from belle_compile.runtime.server.service import Service
from tests.runtime.server.serving import CHAT, listening, serving

# Every parameter that the server supports. Those of vLLM go into `extra_body`.
SHARED: dict[str, Any] = {
    "model": "tiny", "temperature": 0.8, "top_p": 0.9, "n": 2, "seed": 5, "presence_penalty": 0.5, "frequency_penalty": -0.5,
    "logit_bias": {"70": 1}, "stop": ["\n\n", "zzz"], "user": "somebody",
}  # fmt: skip
EXTRA: dict[str, Any] = {
    "top_k": 30, "min_p": 0.01, "repetition_penalty": 1.1, "min_tokens": 2, "ignore_eos": True, "stop_token_ids": [299],
    "prompt_logprobs": 1, "prompt_lookup": 2, "cache_salt": "tenant", "priority": 1, "timeout": 60.0,
}  # fmt: skip
CHAT_FIELDS: dict[str, Any] = SHARED | {
    "messages": CHAT, "max_completion_tokens": 9, "logprobs": True, "top_logprobs": 2, "response_format": {"type": "text"},
    "store": False, "metadata": {"a": "b"},
}  # fmt: skip
TEXT_FIELDS: dict[str, Any] = SHARED | {"prompt": ["hello", "你好"], "max_tokens": 9, "logprobs": 2, "echo": True}
PARAMS = {
    "temperature": 0.8, "top_p": 0.9, "n": 2, "seed": 5, "presence_penalty": 0.5, "frequency_penalty": -0.5,
    "logit_bias": {70: 1}, "stop": ("\n\n", "zzz"),
    "top_k": 30, "min_p": 0.01, "repetition_penalty": 1.1, "min_tokens": 2, "ignore_eos": True,
    "stop_token_ids": (299,), "max_new_tokens": 9, "logprobs": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Service, str]]:
    with serving() as service, listening(service) as url:
        yield service, f"{url}/v1"


@pytest.fixture(scope="module")
def client(server: tuple[Service, str]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server[1], api_key="none", max_retries=0, timeout=20) as client:
        yield client


def expected(service: Service, prompt: Any, **more: Any) -> list[str]:
    return [result.text for result in service.engine.generate([prompt], SamplingParams(**PARAMS), **more)]


def texts_of_chunks(chunks: list[Any], of_choice: Any) -> list[str]:
    texts: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (of_choice(choice) or "")
    return [texts[index] for index in sorted(texts)]


def test_chat_with_every_parameter(server: tuple[Service, str], client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**CHAT_FIELDS, extra_body=EXTRA)
    wanted = expected(server[0], CHAT)
    assert [choice.message.content for choice in whole.choices] == wanted
    assert whole.choices[0].logprobs and whole.choices[0].logprobs.content
    assert [len(entry.top_logprobs) for entry in whole.choices[0].logprobs.content] == [2] * 9
    options: Any = {"stream": True, "stream_options": {"include_usage": True}}
    chunks: list[Any] = list(client.chat.completions.create(**CHAT_FIELDS, **options, extra_body=EXTRA))
    assert texts_of_chunks(chunks, lambda choice: choice.delta.content) == wanted
    assert whole.usage and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 18


def test_completions_with_every_parameter(server: tuple[Service, str], client: openai.OpenAI) -> None:
    whole = client.completions.create(**TEXT_FIELDS, extra_body=EXTRA)
    wanted = [prompt + text for prompt in TEXT_FIELDS["prompt"] for text in expected(server[0], prompt, raw=True)]
    assert [choice.text for choice in whole.choices] == wanted
    chunks: list[Any] = list(client.completions.create(**TEXT_FIELDS, stream=True, extra_body=EXTRA))
    assert texts_of_chunks(chunks, lambda choice: choice.text) == wanted


def test_the_asynchronous_client(server: tuple[Service, str]) -> None:
    async def main() -> tuple[list[Any], list[str], list[str]]:
        async with openai.AsyncOpenAI(base_url=server[1], api_key="none", max_retries=0, timeout=20) as client:
            whole, text = await asyncio.gather(
                client.chat.completions.create(**CHAT_FIELDS, extra_body=EXTRA),
                client.completions.create(**TEXT_FIELDS, extra_body=EXTRA),
            )
            stream: Any = await client.chat.completions.create(**CHAT_FIELDS, stream=True, extra_body=EXTRA)
            chunks = [chunk async for chunk in stream]
            return chunks, [choice.message.content for choice in whole.choices], [choice.text for choice in text.choices]

    chunks, chats, completions = asyncio.run(main())
    assert chats == expected(server[0], CHAT) == texts_of_chunks(chunks, lambda choice: choice.delta.content)
    assert len(completions) == 4


def test_models_raw_headers_and_errors(server: tuple[Service, str], client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").object == "model"
    raw = client.chat.completions.with_raw_response.create(model="tiny", messages=CHAT, seed=1)  # type: ignore[arg-type]
    assert raw.headers["x-result-cache"] in ("hit", "miss") and raw.headers["x-request-id"] in raw.parse().id
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="tiny", messages=CHAT, temperature=-1)  # type: ignore[arg-type]
    assert bad.value.param == "temperature" and bad.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-4", messages=CHAT)  # type: ignore[arg-type]
    assert unknown.value.code == "model_not_found"


def test_a_stream_that_is_closed_is_withdrawn(server: tuple[Service, str], client: openai.OpenAI) -> None:
    before = server[0].engine.stats().cancellations
    streams: Any = [
        client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=120, stream=True)  # type: ignore[arg-type]
        for _ in range(8)
    ]
    for stream in streams:
        next(iter(stream))
        stream.close()
    answer = client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=3)  # type: ignore[arg-type]
    assert answer.choices[0].finish_reason == "length"
    assert server[0].engine.stats().cancellations >= before


def test_the_helper_that_accumulates_a_stream(client: openai.OpenAI) -> None:
    ends = {"stop_token_ids": [70], "logit_bias": {"70": 100}}
    with client.chat.completions.stream(model="tiny", messages=CHAT, extra_body=ends) as stream:  # type: ignore[arg-type]
        stream.until_done()
        assert stream.get_final_completion().choices[0].finish_reason == "stop"


@pytest.fixture
def only_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a test that looks up a host of the network."""
    look_up = socket.getaddrinfo

    def checked(host: Any, *rest: Any, **more: Any) -> Any:
        assert host in ("127.0.0.1", b"127.0.0.1"), f"{host} was looked up"
        return look_up(host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", checked)


def test_litellm(server: tuple[Service, str], only_loopback: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    import litellm

    litellm.telemetry = False
    fields: dict[str, Any] = {"model": "openai/tiny", "messages": CHAT, "api_base": server[1], "api_key": "none", "seed": 5}
    whole: Any = litellm.completion(**fields)
    chunks: Any = litellm.completion(**fields, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content and whole.usage.completion_tokens == 12


def test_langchain(server: tuple[Service, str], only_loopback: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("LANGCHAIN", "LANGSMITH", "OPENAI"))]:
        monkeypatch.delenv(name)
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(model="tiny", base_url=server[1], api_key="none", seed=5, max_retries=0)  # type: ignore[arg-type]
    whole = chat.invoke("hello")
    assert "".join(str(chunk.content) for chunk in chat.stream("hello")) == whole.content != ""
