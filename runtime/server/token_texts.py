"""Tokens in responses: their texts and bytes, and the objects that hold their log probabilities."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Any

from belle_compile.runtime.serving.logprobs import TokenLogprob
from belle_compile.runtime.tokenizer import Tokenizer

UNLIKELY = -9999.0  # what OpenAI writes for a log probability of minus infinity, which JSON does not have


class TokenTexts:
    """The text and the bytes of each token, which are looked up once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, tuple[str, bytes]] = {}

    def lookup(self, token: int) -> tuple[str, bytes]:
        """Return text and bytes of a token. Where the bytes are no whole characters, the text is like "bytes:\\xe4\\xbd"."""
        known = self._known.get(token)
        if known is None:
            known = self._known[token] = self._look_up(token)
        return known

    def is_special(self, token: int) -> bool:
        """Whether a token is no part of any text."""
        return self._tokenizer.is_special(token)

    def _look_up(self, token: int) -> tuple[str, bytes]:
        data = self._tokenizer.token_bytes(token)
        try:
            return data.decode(), data
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data), data

    def chat_logprobs(self, entries: Iterable[TokenLogprob], top: int) -> dict[str, Any]:
        """Return the object `logprobs` of a chat's choice, with `top` alternatives of each token."""
        content = []
        for entry in entries:
            alternatives = [self._scored(token, logprob) for token, logprob in entry.top[:top]]
            content.append({**self._scored(entry.token_id, entry.logprob), "top_logprobs": alternatives})
        return {"content": content, "refusal": None}

    def prompt_logprobs(self, entries: Sequence[TokenLogprob | None], top: int) -> list[dict[str, Any] | None]:
        """Return vLLM's list `prompt_logprobs`: for each token an object by token ids, the token's own first."""
        return [None if entry is None else self._ranked(entry, top) for entry in entries]

    def _scored(self, token: int, logprob: float) -> dict[str, Any]:
        text, data = self.lookup(token)
        return {"token": text, "logprob": max(logprob, UNLIKELY), "bytes": list(data)}

    def _ranked(self, entry: TokenLogprob, top: int) -> dict[str, Any]:
        ranks = {token: rank for rank, (token, _) in enumerate(entry.top, 1)}
        scored = {entry.token_id: entry.logprob, **dict(entry.top[:top])}
        return {
            str(token): {
                "logprob": max(logprob, UNLIKELY),
                "rank": ranks.get(token),  # None for a token that is not among the best
                "decoded_token": self.lookup(token)[0],
            }
            for token, logprob in scored.items()
        }


class CompletionLogprobs:
    """Makes the objects `logprobs` of a completion's choice, of which a stream has one for each piece.

    `text_offset` is the number of characters of the tokens before, those of a prompt that is echoed included. Special tokens
    have none.
    """

    def __init__(self, texts: TokenTexts, top: int) -> None:
        self._texts, self._top = texts, top
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def add(self, tokens: Sequence[int], entries: Sequence[TokenLogprob | None]) -> dict[str, Any]:
        """Return the object for the next tokens. The first token of a prompt, whose entry is None, has no log probability."""
        result: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, entry in zip(tokens, entries, strict=True):
            text, data = self._texts.lookup(token)
            result["tokens"].append(text)
            result["token_logprobs"].append(None if entry is None else max(entry.logprob, UNLIKELY))
            result["top_logprobs"].append(None if entry is None else self._alternatives(entry))
            result["text_offset"].append(self._offset)
            if not self._texts.is_special(token):
                self._offset += len(self._decoder.decode(data))
        return result

    def _alternatives(self, entry: TokenLogprob) -> dict[str, float]:
        """The best tokens, best first, and the token itself. Of tokens with equal texts the more likely one is kept."""
        scored: dict[str, float] = {}
        for token, logprob in (*entry.top[: self._top], (entry.token_id, entry.logprob)):
            scored.setdefault(self._texts.lookup(token)[0], max(logprob, UNLIKELY))
        return scored
