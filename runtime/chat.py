"""From chats and texts to token ids: the prompt template and the tokenizer together."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from belle_compile.runtime.control_tokens import ControlTokens
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.prompt import ChatTemplate, Message, Variables
from belle_compile.runtime.tokenizer import Tokenizer

_PROBES = (("user",), ("system", "user"), ("user", "assistant", "user"))  # roles of chats that show what a template writes


class ChatEncoder:
    """Encodes prompts as Transformers does, except for names of control tokens in messages: these are text.

    Nobody can end a turn and begin another one by what a message holds. Control tokens are the special ones, those of the
    manifest, and tokens added to the vocabulary that the template itself writes around messages.
    """

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer) -> None:
        self._template, self._tokenizer = template, tokenizer

    def encode(
        self,
        messages: Sequence[Message],
        *,
        parse_special: bool = False,
        add_generation_prompt: bool = True,
        add_bos: bool | None = None,
        variables: Variables | None = None,
    ) -> list[int]:
        """Return the ids of a chat. With `parse_special`, names of special tokens in messages are these tokens.

        `variables` are set in the template; texts in them are written by users, as messages are. Raises `EngineError` for
        variables that the template does not read, and for messages that it refuses.
        """
        checked = self.check_variables(variables or {})
        given, checked = (messages, checked) if parse_special else (self._control.mark(messages), self._control.mark(checked))
        text = self._template.render(given, add_generation_prompt=add_generation_prompt, variables=checked)
        return self._encode(text, parse_special, add_bos)

    def encode_text(self, text: str, *, parse_special: bool = True, add_bos: bool | None = None) -> list[int]:
        """Return the ids of a text to which no template is applied. Names of special tokens are these tokens by default."""
        return self._encode(text if parse_special else self._control.mark(text), parse_special, add_bos)

    def check_variables(self, given: Variables) -> dict[str, Any]:
        """Return variables of the template as it gets them; raises `EngineError` for what it does not read."""
        return self._template.check_variables(given)

    def may_take_long(self, data: bytes) -> bool:
        """Whether to encode the prompts of a JSON body may take seconds, though it is short."""
        return self._control.may_copy(data)

    def _encode(self, text: str, parse_special: bool, add_bos: bool | None) -> list[int]:
        return self._tokenizer.encode(text, add_bos=add_bos, control=None if parse_special else self._control)

    @cached_property
    def _control(self) -> ControlTokens:
        frame = ""
        for roles in _PROBES:
            with contextlib.suppress(EngineError):  # a template may know no system, for example
                frame += self._template.render([{"role": role, "content": "x"} for role in roles])
        return self._tokenizer.control_tokens(frame)
