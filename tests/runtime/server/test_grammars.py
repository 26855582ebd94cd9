"""Answers that follow a form: every field that asks for one, by OpenAI's names and by vLLM's, and forms that are refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from belle_compile.runtime import SamplingParams
from belle_compile.runtime.server.service import Service
from belle_compile.runtime.serving.grammar.constraint import Constraint
from belle_compile.runtime.serving.grammar.source import Grammar, GrammarFailure
from tests.runtime.server.serving import CHAT, chat, complete, post, serving, stream

SCHEMA = {"type": "object", "properties": {"b": {"enum": [1, 2]}, "a": {"type": "boolean"}}, "required": ["b", "a"],
          "additionalProperties": False}  # fmt: skip
LARK = 'start: "yes" | "no"'
FORMS: list[tuple[dict[str, Any], str]] = [
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}},
        "json_schema",
    ),
    ({"guided_json": SCHEMA}, "json_schema"),
    ({"guided_json": json.dumps(SCHEMA)}, "json_schema"),
    ({"structured_outputs": {"json": SCHEMA}}, "json_schema"),
    ({"regex": "[0-9]{3}-[a-f]{2}"}, "regex"),
    ({"guided_regex": "[0-9]{3}-[a-f]{2}"}, "regex"),
    ({"structured_outputs": {"regex": "[0-9]{3}-[a-f]{2}"}}, "regex"),
    ({"grammar": LARK}, "lark"),
    ({"guided_grammar": LARK}, "lark"),
    ({"structured_outputs": {"grammar": LARK}}, "lark"),
]


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with serving() as service:
        yield service


def check(kind: str, text: str) -> None:
    if kind == "json_schema":
        value = json.loads(text)
        assert list(value) == ["b", "a"] and value["b"] in (1, 2) and isinstance(value["a"], bool), "in the schema's order"
    else:
        assert re.fullmatch("[0-9]{3}-[a-f]{2}" if kind == "regex" else "yes|no", text)


@pytest.mark.parametrize(("form", "kind"), FORMS)
def test_answers_follow_the_form(service: Service, form: dict[str, Any], kind: str) -> None:
    (choice,) = chat(service, seed=1, max_tokens=100, **form)["choices"]
    assert choice["finish_reason"] == "stop"
    check(kind, choice["message"]["content"])
    assert complete(service, seed=1, max_tokens=100, **form)["choices"][0]["finish_reason"] == "stop"
    chunks = stream(service, "/v1/chat/completions", seed=1, max_tokens=100, **form)
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == choice["message"]["content"]


def test_a_json_object(service: Service) -> None:
    grammar = Grammar("json_object")
    (wanted,) = service.engine.generate([CHAT], SamplingParams(seed=1, grammar=grammar, max_new_tokens=9))
    for form in ({"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}):
        (choice,) = chat(service, seed=1, max_tokens=9, **form)["choices"]
        assert choice["message"]["content"] == wanted.text and wanted.text.startswith("{")


def test_text_is_no_form(service: Service) -> None:
    plain = chat(service, seed=1)["choices"]
    for form in (
        {"response_format": {"type": "text"}},
        {"structured_outputs": {}},
        {"structured_outputs": {"json_object": False}},
    ):
        assert chat(service, seed=1, **form)["choices"] == plain


DEEP = json.loads('{"items":' * 400 + "{}" + "}" * 400)


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ({"regex": "a("}, "regex"),
        ({"guided_regex": "(" * 10_000}, "guided_regex"),
        ({"grammar": "start: nothing"}, "grammar"),
        ({"guided_grammar": "x" * 100_000}, "guided_grammar"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": "[1]"}, "guided_json"),
        ({"structured_outputs": {"json": {"type": "nonsense"}}}, "structured_outputs"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 5}}}}, "response_format"),
        ({"guided_json": {"pattern": "x" * 100_000, "type": "string"}}, "guided_json"),
    ],
)
def test_a_form_that_cannot_be_used(service: Service, form: dict[str, Any], param: str) -> None:
    response = post(service, "/v1/chat/completions", {"messages": CHAT} | form)
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == param, error
    assert len(error["message"]) < 1000


def test_a_schema_that_nests_deeply_harms_nobody(service: Service) -> None:
    response = post(service, "/v1/completions", {"prompt": "x", "guided_json": DEEP, "max_tokens": 2})
    assert response.status_code in (200, 400)
    body = b'{"prompt": "x", "guided_json": ' + b'{"items":' * 10_000 + b"{}" + b"}" * 10_000 + b"}"
    response = post(service, "/v1/completions", body)
    assert response.status_code == 400 and "nested too deeply" in response.json()["error"]["message"]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_grammar_that_fails_while_it_is_followed(streamed: bool, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def restrict(self: Constraint, logits: Any) -> Any:
        raise GrammarFailure("a grammar that takes too long")

    monkeypatch.setattr(Constraint, "restrict", restrict)
    fields = {"messages": CHAT, "guided_regex": "(a|b)*", "stream": streamed}
    response = post(service, "/v1/chat/completions", fields)
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == "guided_regex"
    assert "takes too long" in error["message"]
