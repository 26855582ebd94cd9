"""chat_template_kwargs over HTTP, and the server's defaults for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from belle_compile.runtime.artifact import PromptTemplate
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.server.options import ServerOptions
from belle_compile.runtime.server.service import Service
from tests.runtime.server.serving import CHAT, chat, post, serving
from tests.runtime.test_template_variables import QWEN3

PATH = "/v1/chat/completions"
TEMPLATE = PromptTemplate("qwen3", QWEN3, "", "</s>")
OFF, ON = {"enable_thinking": False}, {"enable_thinking": True}


@pytest.fixture(scope="module", name="service")
def _service() -> Iterator[Service]:
    with serving(prompt_template=TEMPLATE) as service:
        yield service


def prompt_ids(service: Service, given: Any) -> list[int]:
    answer = chat(service, seed=1, max_tokens=1, return_token_ids=True, chat_template_kwargs=given)
    ids: list[int] = answer["prompt_token_ids"]
    return ids


def tokens(service: Service, given: Any) -> list[int]:
    ids: list[int] = post(service, "/tokenize", {"messages": CHAT, "chat_template_kwargs": given}).json()["tokens"]
    return ids


@pytest.mark.parametrize("given", [None, {}, OFF, ON])
def test_a_chat_has_the_prompt_of_its_variables(service: Service, given: dict[str, Any] | None) -> None:
    expected = service.engine.encode(CHAT, chat_template_kwargs=given)
    assert prompt_ids(service, given) == tokens(service, given) == expected
    assert (expected != service.engine.encode(CHAT)) == (given == OFF)


def test_the_result_cache_knows_the_prompts_apart(service: Service) -> None:
    def outcome(given: Any) -> str:
        body = {"messages": CHAT, "seed": 5, "max_tokens": 3, "chat_template_kwargs": given}
        return post(service, PATH, body).headers["x-result-cache"]

    assert [outcome(given) for given in (None, OFF, ON, OFF)] == ["miss", "miss", "hit", "hit"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"enable_thinkin": False}, "found 'enable_thinkin', expected variables that template qwen3 reads: enable_thinking."),
        ({"messages": []}, "found 'messages', expected variables that template qwen3 reads: enable_thinking."),
        ({"enable_thinking": "x" * 70_000}, "found 70023 characters of JSON, expected at most 65536."),
        ("enable_thinking", "expected an object, found a string."),
        ([], "expected an object, found a list."),
    ],
)
@pytest.mark.parametrize("path", [PATH, "/tokenize"])
def test_what_is_refused(service: Service, path: str, given: Any, message: str) -> None:
    response = post(service, path, {"messages": CHAT, "chat_template_kwargs": given})
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == "chat_template_kwargs", error
    assert error["message"].endswith(message), error


def test_a_text_has_no_template(service: Service) -> None:
    for path, body in (("/tokenize", {"prompt": "a"}), ("/v1/completions", {"prompt": "a"})):
        error = post(service, path, {**body, "chat_template_kwargs": OFF}).json()["error"]
        assert error["param"] == "chat_template_kwargs"


def test_defaults_of_the_server() -> None:
    options = ServerOptions(default_chat_template_kwargs='{"enable_thinking": false}')
    with serving(options=options, prompt_template=TEMPLATE) as service:
        expected = service.engine.encode(CHAT, chat_template_kwargs=OFF)
        assert prompt_ids(service, None) == prompt_ids(service, {}) == tokens(service, None) == expected
        assert prompt_ids(service, ON) == service.engine.encode(CHAT)


@pytest.mark.parametrize("text", ["", "{", "[]", "1"])
def test_defaults_that_are_no_object(text: str) -> None:
    with pytest.raises(EngineError, match=r"server options: default-chat-template-kwargs: found .*, expected a JSON object"):
        ServerOptions(default_chat_template_kwargs=text)


def test_defaults_that_the_template_does_not_read() -> None:
    with pytest.raises(EngineError, match=r"chat_template_kwargs: found 'thinking', expected variables that template"):
        with serving(options=ServerOptions(default_chat_template_kwargs='{"thinking": true}'), prompt_template=TEMPLATE):
            pass
