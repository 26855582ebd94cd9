"""Keys of requests by how their prompts begin."""

from __future__ import annotations

import json
from typing import Any

import pytest

from belle_compile.runtime.scale_out.affinity import affinity_key

SYSTEM = {"role": "system", "content": "You are brief."}


def key(chars: int = 8, **body: Any) -> str:
    return affinity_key(json.dumps(body).encode(), chars)


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def test_all_turns_of_a_chat_have_one_key() -> None:
    turns = [SYSTEM, user("first question")]
    later = [*turns, {"role": "assistant", "content": "yes"}, user("second")]
    assert key(messages=turns) == key(messages=later, temperature=1, stream=True)
    assert key(messages=turns) == key(messages=[SYSTEM, user("first qu, and then another")])
    assert key(messages=turns) != key(messages=[SYSTEM, user("first, and then another")])
    assert key(messages=turns) != key(messages=[{**SYSTEM, "content": SYSTEM["content"] + " Or not."}, user("first question")])
    assert len(key(messages=[user([{"type": "text", "text": "parts"}])])) == 64


def test_completions_go_by_the_beginning_of_the_first_prompt() -> None:
    assert key(prompt="12345678abc") == key(prompt="12345678def") == key(prompt=["12345678", "other"]) != key(prompt="1234567")
    assert key(prompt=[1, 2, 3]) == key(prompt=[[1, 2, 3], [4]]) != key(prompt=[1, 2])


def test_nothing_is_shared_between_adapters_and_salts() -> None:
    keys = {key(prompt="a"), key(prompt="a", model="adapter"), key(prompt="a", cache_salt="salt")}
    assert len(keys) == 3


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b'{"prompt": ""}', b'{"prompt": 1}', b'{"messages": []}', b"\xff", b"[" * 99999]
)
def test_what_has_no_prompt_has_no_key(body: bytes) -> None:
    assert affinity_key(body, 8) == ""


@pytest.mark.parametrize("messages", [[1], [None], [{"role": "user"}], [{"content": 1}], ["text"]])
def test_messages_that_the_server_refuses_have_some_key(messages: list[Any]) -> None:
    assert len(key(messages=messages)) == 64
