"""Text to tokens and back, piece by piece: complete characters only, ending before a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tokenizers

from belle_compile.runtime.artifact import SpecialTokens
from belle_compile.runtime.errors import EngineError

_REPLACEMENT = "\ufffd"
# A character is at most 4 bytes, so at most 4 tokens; what is not text after that many never will be.
_MOST_PENDING_TOKENS = 8


class Tokenizer:
    """The engine's tokenizer.json with its special tokens."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, special: SpecialTokens) -> None:
        # A saved truncation or padding setting would cut or pad prompts in silence.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.special = special

    @classmethod
    def from_file(cls, path: Path, special: SpecialTokens) -> Tokenizer:
        """Read tokenizer.json; raises `EngineError` when it is not one."""
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)), special)
        except Exception as error:  # the library raises plain Exception for whatever it cannot parse
            remedy = "rebuild the engine with belle-compile build"
            raise EngineError("engine", f"{path} is no tokenizer", found=str(error), remedy=remedy) from error

    def encode(self, text: str, *, add_bos: bool | None = None) -> list[int]:
        """Token ids; begins with BOS where the model wants it or `add_bos` says so, once."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        bos = self.special.bos
        if (self.special.add_bos if add_bos is None else add_bos) and bos is not None and ids[:1] != [bos]:
            return [bos, *ids]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))


class Detokenizer:
    """Text of a growing answer. The pieces joined are the text of all tokens, for answers that are valid UTF-8.

    Decodes a window that begins with the tokens before the last finished piece: a SentencePiece token alone would lose
    its leading space. What may still change, the bytes of a character that is not complete, is held back.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._context = 0  # tokens at the window's start whose text is out
        self._emitted = 0  # characters of the window's text that are out

    def push(self, token: int) -> str:
        """The text that became certain with this token, often all of its own, sometimes empty."""
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
        """The rest, when no token will follow."""
        text = self._tokenizer.decode(self._window)
        piece = text[self._emitted :]
        self._emitted = len(text)
        return piece


class StopStrings:
    """Cuts a text that comes in pieces before the first stop string, wherever the pieces' borders are."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """The text that is certain to come before any stop string; sets `found` at the first one."""
        if not self._stops or not piece:
            return piece
        text = self._held + piece
        starts = [start for stop in self._stops if (start := text.find(stop)) >= 0]
        if starts:
            self.found, self._held = True, ""
            return text[: min(starts)]
        hold = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]

    def flush(self) -> str:
        """What was held back in case a stop string would follow."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
