"""Text to tokens and back. Text of a growing answer comes in pieces of whole characters and ends before a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tokenizers

from belle_compile.runtime.artifact import SpecialTokens
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.serving.grammar.grammars import Grammars

_REPLACEMENT = "\ufffd"
# A character has at most 4 bytes, and so at most 4 tokens. Bytes that make no character after more tokens than that never will.
_MOST_PENDING_TOKENS = 8


class Tokenizer:
    """The tokenizer of an engine: its tokenizer.json, and the special tokens of its manifest."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, special: SpecialTokens) -> None:
        # A tokenizer.json may hold settings for truncation and padding, which would cut or pad prompts in silence.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.special = special
        self.grammars = Grammars(tokenizer.to_str, special.eos)

    @classmethod
    def from_file(cls, path: Path, special: SpecialTokens) -> Tokenizer:
        """Read tokenizer.json; raises `EngineError` when it is not one."""
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)), special)
        except Exception as error:  # the library raises plain Exception for whatever it cannot parse
            remedy = "rebuild the engine with belle-compile build"
            raise EngineError("engine", f"{path} is no tokenizer", found=str(error), remedy=remedy) from error

    def encode(self, text: str, *, add_bos: bool | None = None) -> list[int]:
        """Return token ids, which begin with one BOS token if `add_bos` is True; None stands for the model's setting."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        bos = self.special.bos
        if (self.special.add_bos if add_bos is None else add_bos) and bos is not None and ids[:1] != [bos]:
            return [bos, *ids]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, without that of special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))


class Detokenizer:
    """Decodes an answer token by token. For answers that are valid UTF-8, the pieces joined are the text of all tokens.

    Each call decodes a window of tokens. It begins with those of the last finished piece as context, without which a
    SentencePiece token would lose its leading space. The bytes of a character that is not complete are held back.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._context = 0  # tokens at the window's start whose text was returned
        self._emitted = 0  # characters of the window's text that were returned

    def push(self, token: int) -> str:
        """Add a token; returns the text that cannot change any more and was not returned before, possibly none."""
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        certain = len(text)
        if len(self._window) - self._context <= _MOST_PENDING_TOKENS:
            certain = len(text.rstrip(_REPLACEMENT))
        piece = text[self._emitted : certain]
        self._emitted = max(self._emitted, certain)
        if piece and certain == len(text):
            self._window = self._window[self._context :]
            self._context = len(self._window)
            self._emitted = len(self._tokenizer.decode(self._window))
        return piece

    def flush(self) -> str:
        """Return the rest of the text, when no token will follow."""
        text = self._tokenizer.decode(self._window)
        piece = text[self._emitted :]
        self._emitted = len(text)
        return piece


class StopStrings:
    """Cuts a text that comes in pieces before the first stop string, which may lie across pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.matched = False

    def push(self, piece: str) -> str:
        """Add a piece; returns the text that no stop string can begin in. Sets `matched` at the first stop string."""
        if not self._stops or not piece:
            return piece
        text = self._held + piece
        starts = [start for stop in self._stops if (start := text.find(stop)) >= 0]
        if starts:
            self.matched, self._held = True, ""
            return text[: min(starts)]
        hold = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]

    def flush(self) -> str:
        """Return the text that was held back because a stop string could begin in it."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of `text` that is a prefix of `stop`, but not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
