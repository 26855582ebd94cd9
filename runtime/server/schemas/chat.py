"""The body of POST /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from belle_compile.runtime.server.errors import kind_of
from belle_compile.runtime.server.schemas.fields import Body, Only, Whole, conflict, unsupported, wrong_type
from belle_compile.runtime.server.schemas.sampling import SamplingBody
from belle_compile.runtime.serving.request import MAX_LOGPROBS

NO_TOOLS = "the server calls no tools"


def _content(value: Any) -> Any:
    """Return the text of a message's content; parts of text are joined as they are."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise wrong_type("a string or a list of text parts")
    texts = []
    for place, part in enumerate(value):
        if not isinstance(part, dict):
            raise wrong_type(f"parts that are objects, part {place} is {kind_of(part)}")
        if part.get("type") != "text":
            found = repr(part.get("type"))[:40]
            raise unsupported(f"part {place} has the type {found}, expected 'text'")
        if not isinstance(part.get("text"), str) or len(part) > 2:
            raise wrong_type(f'parts {{"type": "text", "text": …}}, part {place} has other fields')
        texts.append(part["text"])
    return "".join(texts)


_PART = {
    "type": "object",
    "properties": {"type": {"enum": ["text"]}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}
Content = Annotated[
    str,
    BeforeValidator(_content),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": _PART}]}),
]


class ChatMessage(Body):
    """A message of a chat. The role "developer" is OpenAI's newer name of "system"."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: Annotated[Any, Only(None, because="prompts have no names of participants")] = None

    # What OpenAI's clients send with an answer that they were given.
    refusal: Annotated[Any, Only(None)] = None
    annotations: Annotated[Any, Only(None, [])] = None
    audio: Annotated[Any, Only(None)] = None
    tool_calls: Annotated[Any, Only(None, [], because=NO_TOOLS)] = None
    function_call: Annotated[Any, Only(None, because=NO_TOOLS)] = None

    def for_template(self) -> dict[str, str]:
        """Return the message as prompt templates know it."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class ChatBody(SamplingBody):
    """A chat to be continued by the assistant."""

    messages: list[ChatMessage] = Field(min_length=1, fail_fast=True)
    max_tokens: Annotated[int, Whole(1)] | None = None
    max_completion_tokens: Annotated[int, Whole(1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Whole(0, MAX_LOGPROBS)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    # Known fields that change no answer here.
    store: bool | None = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None
    parallel_tool_calls: bool | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None

    # Known fields that would change the answer. What asks for nothing passes.
    tools: Annotated[Any, Only(None, [], because=NO_TOOLS)] = None
    tool_choice: Annotated[Any, Only(None, "none", "auto", because=NO_TOOLS)] = None
    functions: Annotated[Any, Only(None, [], because=NO_TOOLS)] = None
    function_call: Annotated[Any, Only(None, "none", "auto", because=NO_TOOLS)] = None
    modalities: Annotated[Any, Only(None, ["text"])] = None
    audio: Annotated[Any, Only(None)] = None
    moderation: Annotated[Any, Only(None)] = None
    prediction: Annotated[Any, Only(None, because="prompt_lookup guesses ahead in its place")] = None
    reasoning_effort: Annotated[Any, Only(None, "none")] = None
    verbosity: Annotated[Any, Only(None, "medium")] = None
    web_search_options: Annotated[Any, Only(None)] = None
    echo: Annotated[Any, Only(None, False)] = None
    add_generation_prompt: Annotated[Any, Only(None, True)] = None
    continue_final_message: Annotated[Any, Only(None, False)] = None
    add_special_tokens: Annotated[Any, Only(None, False)] = None
    chat_template: Annotated[Any, Only(None)] = None
    documents: Annotated[Any, Only(None, [])] = None

    @model_validator(mode="after")
    def _chat_fits_together(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise conflict("'top_logprobs' is only allowed with 'logprobs': true", "top_logprobs")
        both = self.max_tokens is not None and self.max_completion_tokens is not None
        if both and self.max_tokens != self.max_completion_tokens:
            raise conflict("'max_tokens' and 'max_completion_tokens' differ, give one of them", "max_tokens")
        return self

    @property
    def prompt_field(self) -> str:
        """The name of the field that has the prompt."""
        return "messages"

    @property
    def echoes(self) -> bool:
        """Whether the prompt comes before each answer."""
        return False

    @property
    def limit_field(self) -> str:
        """The name of the field that limits the answer."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def answer_limit(self) -> int | None:
        """Tokens of the answer, at most; None leaves it to the engine."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def alternatives(self) -> int | None:
        """How many alternatives of each token come with its log probability; None asks for no log probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None
