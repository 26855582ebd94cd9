"""One request, whatever format it came in, and the JSON line it is stored as."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

STAGE = "calibration"

Message = Mapping[str, str]  # {"role": "user" | "assistant" | "system" | "tool", "content": text}


@dataclass(frozen=True)
class Request:
    """What a user asked: exactly one of `text`, `messages` (chat, the last one the user's) and `token_ids`.

    `answer` is the answer that is expected, if one is known. `labels` are the values of the fields asked for as labels. `line`
    is where the request stood in its file, counted from 1.
    """

    text: str | None = None
    messages: tuple[Message, ...] | None = None
    token_ids: tuple[int, ...] | None = None
    answer: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    line: int = 0

    def written(self) -> str:
        """All its text, a line break between messages; empty for token ids."""
        if self.messages is not None:
            return "\n".join(message["content"] for message in self.messages)
        return self.text or ""

    def to_json(self) -> str:
        """One line of JSON; the same request gives the same line."""
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
        """What `to_json` wrote."""
        plain = json.loads(line)
        for name in ("messages", "token_ids"):
            if name in plain:
                plain[name] = tuple(plain[name])
        return cls(**plain)
