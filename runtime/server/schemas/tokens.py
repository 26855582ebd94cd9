"""The bodies of POST /tokenize and POST /detokenize, which are vLLM's."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from belle_compile.runtime.server.schemas.chat import NO_TOOLS, ChatMessage
from belle_compile.runtime.server.schemas.fields import Body, Only, Whole, conflict


class TokenizeBody(Body):
    """A text, or a chat to which the engine's template is applied.

    The tokens are those that a completion or a chat with it would have. `add_special_tokens` false leaves out the token that
    the model's setting puts before every prompt, and `add_generation_prompt` false the beginning of the next answer.
    `parse_special` says whether names of special tokens are these tokens, by default in a text only. `chat_template_kwargs` are
    those of a chat.
    """

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1, fail_fast=True)
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    parse_special: bool | None = None
    return_token_strs: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: Annotated[Any, Only(None, False)] = None
    chat_template: Annotated[Any, Only(None)] = None
    tools: Annotated[Any, Only(None, [], because=NO_TOOLS)] = None

    @model_validator(mode="after")
    def _has_one_of_both(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise conflict("Give either 'prompt' or 'messages'", "prompt")
        if self.messages is None and self.chat_template_kwargs:
            raise conflict("'chat_template_kwargs' is only allowed with 'messages'", "chat_template_kwargs")
        return self


class DetokenizeBody(Body):
    """Token ids."""

    model: str | None = None
    tokens: list[Annotated[int, Whole(0)]] = Field(fail_fast=True)
