"""Checks responses against the types of the package `openai`, strictly: fields have their types, and there are no others."""

from __future__ import annotations

from typing import Any

from openai import BaseModel
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel as AnyModel

TYPE_OF: dict[str, type[BaseModel]] = {
    "chat.completion": ChatCompletion,
    "chat.completion.chunk": ChatCompletionChunk,
    "text_completion": Completion,
    "model": Model,
}


def check(value: dict[str, Any], *extensions: str) -> None:
    """Raise for a response that does not fit; `extensions` are paths of fields that OpenAI does not have."""
    if value["object"] == "text_completion":  # whose chunks have no finish_reason but in the last one, which the type ignores
        choices = [choice | {"finish_reason": choice["finish_reason"] or "stop"} for choice in value["choices"]]
        value = value | {"choices": choices}
    parsed = TYPE_OF[value["object"]].model_validate(value, strict=True)
    assert set(_unknown(parsed, "")) <= set(extensions)


def _unknown(value: Any, path: str) -> list[str]:
    if isinstance(value, list):
        return [name for item in value for name in _unknown(item, path)]
    if not isinstance(value, AnyModel):
        return []
    inner = [name for field in type(value).model_fields for name in _unknown(getattr(value, field), f"{path}{field}.")]
    return [f"{path}{name}" for name in value.model_extra or {}] + inner
