"""A request of a calibration set, and the JSON line that stores it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

STAGE = "calibration"

Message = Mapping[str, str]  # {"role": "user" | "assistant" | "system" | "tool", "content": text}


@dataclass(frozen=True)
class Request:
    """A user's request: exactly one of `text`, `messages` (a chat whose last message is the user's) and `token_ids`.

    `answer` is the expected answer, if one is known. `labels` are the values of the fields that were named as labels. `line`
    is the number of the request's line in its file, from 1.
    """

    text: str | None = None
    messages: tuple[Message, ...] | None = None
    token_ids: tuple[int, ...] | None = None
    answer: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    line: int = 0

    def written(self) -> str:
        """The text, or the contents of all messages with line breaks between them; empty for token ids."""
        if self.messages is not None:
            return "\n".join(message["content"] for message in self.messages)
        return self.text or ""

    def to_json(self) -> str:
        """One line of JSON; equal requests give equal lines."""
        plain: dict[str, Any] = {"line": self.line}
        if self.token_ids is not None:
            plain["token_ids"] = self.token_ids
        elif self.messages is not None:
            plain["messages"] = [dict(message) for message in self.messages]
        else:
            plain["text"] = self.text
        if self.answer:
            plain["answer"] = self.answer
        if self.labels:
            plain["labels"] = dict(self.labels)
        return json.dumps(plain, ensure_ascii=False, sort_keys=True)

    @classmethod
    def from_json(cls, line: str | bytes) -> Request:
        """Read a line that `to_json` wrote; raises ValueError or TypeError for anything else."""
        plain = json.loads(line)
        for name in ("messages", "token_ids"):
            if name in plain:
                plain[name] = tuple(plain[name])
        request = cls(**plain)
        if not request._is_typed():
            raise ValueError("a request with values of other types")
        return request

    def _is_typed(self) -> bool:
        shapes = [shape for shape in (self.text, self.messages, self.token_ids) if shape is not None]
        texts = [self.answer, *self.labels.values(), *([] if self.text is None else [self.text])]
        for message in self.messages or ():
            texts += [message["role"], message["content"]]
        numbers = [self.line, *(self.token_ids or ())]
        return len(shapes) == 1 and all(type(text) is str for text in texts) and all(type(number) is int for number in numbers)
