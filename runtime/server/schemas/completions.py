"""The body of POST /v1/completions."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema

from belle_compile.runtime.server.errors import kind_of
from belle_compile.runtime.server.schemas.fields import Only, Whole, bad_value, wrong_type
from belle_compile.runtime.server.schemas.sampling import SamplingBody
from belle_compile.runtime.serving.request import MAX_LOGPROBS

_KINDS = "a string, a list of strings, token ids or a list of token ids"


def _prompts(value: Any) -> list[str] | list[list[int]]:
    """Return the prompts, each a text or token ids."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise wrong_type(_KINDS)
    if not value:
        raise bad_value(f"{_KINDS}, found an empty list")
    if all(isinstance(item, str) for item in value):
        return value
    prompts = value if isinstance(value[0], list) else [value]
    for place, prompt in enumerate(prompts):
        if not isinstance(prompt, list) or set(map(type, prompt)) - {int}:
            item = prompt if not isinstance(prompt, list) else next(item for item in prompt if type(item) is not int)
            raise wrong_type(f"{_KINDS}, prompt {place} has {kind_of(item)}")
    return prompts


_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_TEXT = {"type": "string", "minLength": 1}
_TEXTS = {"type": "array", "items": _TEXT, "minItems": 1}
Prompts = Annotated[
    Any,
    BeforeValidator(_prompts),
    WithJsonSchema({"anyOf": [_TEXT, _TEXTS, _IDS, {"type": "array", "items": _IDS, "minItems": 1}]}),
]


class CompletionBody(SamplingBody):
    """Prompts to be continued as they are, without a template."""

    prompt: Prompts
    max_tokens: Annotated[int, Whole(0)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Whole(0, MAX_LOGPROBS)] | None = None
    suffix: Annotated[Any, Only(None, "")] = None
    add_special_tokens: Annotated[Any, Only(None, True)] = None
    prompt_embeds: Annotated[Any, Only(None)] = None

    @property
    def prompt_field(self) -> str:
        """The name of the field that has the prompt."""
        return "prompt"

    @property
    def echoes(self) -> bool:
        """Whether the prompt comes before each answer."""
        return bool(self.echo)

    @property
    def limit_field(self) -> str:
        """The name of the field that limits the answer."""
        return "max_tokens"

    @property
    def answer_limit(self) -> int | None:
        """Tokens of the answer, at most; None leaves it to the engine."""
        return self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """How many alternatives of each token come with its log probability; None asks for no log probabilities."""
        return self.logprobs
