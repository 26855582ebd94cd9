"""Every parameter that the package `openai` can send is decided: it is supported, harmless, or refused by name."""

from __future__ import annotations

from typing import Any, get_type_hints

import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsStreaming as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsStreaming as TextParams

from belle_compile.runtime.server.schemas.chat import ChatBody
from belle_compile.runtime.server.schemas.completions import CompletionBody
from tests.runtime.server.serving import CHAT, chat, complete, post, serving

HARMLESS: dict[str, Any] = {
    "store": True, "metadata": {"job": "1"}, "service_tier": "auto", "parallel_tool_calls": True, "user": "somebody",
    "safety_identifier": "s", "prompt_cache_key": "k", "prompt_cache_retention": "24h", "prompt_cache_options": {"ttl": "30m"},
}  # fmt: skip
# A value that asks for nothing, and one that would change the answer.
UNSUPPORTED: dict[str, tuple[Any, Any]] = {
    "tools": ([], [{"type": "function", "function": {"name": "f"}}]),
    "tool_choice": ("auto", "required"),
    "functions": ([], [{"name": "f"}]),
    "function_call": ("none", {"name": "f"}),
    "modalities": (["text"], ["audio"]),
    "audio": (None, {"voice": "x", "format": "wav"}),
    "moderation": (None, {"model": "x"}),
    "prediction": (None, {"type": "content", "content": "x"}),
    "reasoning_effort": (None, "high"),
    "verbosity": ("medium", "low"),
    "web_search_options": (None, {}),
    "add_generation_prompt": (True, False),
    "chat_template": (None, "{{ messages }}"),
}
UNSUPPORTED_IN_BOTH: dict[str, tuple[Any, Any]] = {
    "best_of": (1, 2),
    "length_penalty": (1, 0.5),
    "use_beam_search": (False, True),
    "bad_words": ([], ["x"]),
    "allowed_token_ids": (None, [1]),
    "include_stop_str_in_output": (False, True),
    "skip_special_tokens": (True, False),
    "truncate_prompt_tokens": (None, 5),
    "guided_choice": (None, ["a", "b"]),
}


@pytest.mark.parametrize(("params", "schema"), [(ChatParams, ChatBody), (TextParams, CompletionBody)])
def test_every_parameter_of_the_client_is_known(params: type, schema: type[ChatBody | CompletionBody]) -> None:
    assert set(get_type_hints(params)) - set(schema.model_fields) == set()


def test_harmless_parameters_change_nothing() -> None:
    with serving() as service:
        plain = chat(service, seed=6)["choices"]
        for name, value in HARMLESS.items():
            assert chat(service, seed=6, **{name: value})["choices"] == plain, name


@pytest.mark.parametrize(
    ("path", "name", "nothing", "something"),
    [("/v1/chat/completions", name, *values) for name, values in (UNSUPPORTED | UNSUPPORTED_IN_BOTH).items()]
    + [("/v1/completions", name, *values) for name, values in {"suffix": ("", "x"), **UNSUPPORTED_IN_BOTH}.items()],
)
def test_what_would_change_the_answer_is_refused_by_name(path: str, name: str, nothing: Any, something: Any) -> None:
    prompt: dict[str, Any] = {"messages": CHAT} if "chat" in path else {"prompt": "hello"}
    with serving() as service:
        ask = chat if "chat" in path else complete
        assert ask(service, seed=6, **{name: nothing})["choices"] == ask(service, seed=6)["choices"]
        response = post(service, path, prompt | {name: something})
    error = response.json()["error"]
    assert response.status_code == 400
    assert (error["code"], error["param"]) == ("unsupported_parameter", name)
    assert error["message"].startswith(f"'{name}' is not supported: ")
