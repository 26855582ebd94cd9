"""Text to tokens and back. Text of a growing answer comes in pieces of whole characters and ends before a stop string."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import tokenizers

from belle_compile.runtime import sentencepiece_rule
from belle_compile.runtime.artifact import SpecialTokens
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.serving.grammar.grammars import Grammars

_REPLACEMENT = "\ufffd"
# A character has at most 4 bytes, and so at most 4 tokens. Bytes that make no character after more tokens than that never will.
_MOST_PENDING_TOKENS = 8
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")  # how SentencePiece writes a byte that is no character of its vocabulary
_SPACE = "\u2581"  # how SentencePiece writes a space
_LONG_TEXT = 4096  # characters


class Tokenizer:
    """The tokenizer of an engine: its tokenizer.json, and the special tokens of its manifest."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, special: SpecialTokens, *, text: str | None = None) -> None:
        """`text` is the tokenizer.json, for a tokenizer that the library cannot write."""
        # A tokenizer.json may hold settings for truncation and padding, which would cut or pad prompts in silence.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.special = special
        self._settled_texts: dict[int, str | None] = {}
        self.grammars = Grammars(tokenizer.to_str if text is None else lambda: text, special.eos)

    @classmethod
    def from_file(cls, path: Path, special: SpecialTokens) -> Tokenizer:
        """Read tokenizer.json; raises `EngineError` when it is not one."""
        try:
            return cls.from_text(path.read_text(encoding="utf-8"), special)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises plain Exception for whatever it cannot parse, or panics
            remedy = "rebuild the engine with belle-compile build"
            raise EngineError("engine", f"{path} is no tokenizer", found=str(error), remedy=remedy) from error

    @classmethod
    def from_text(cls, text: str, special: SpecialTokens) -> Tokenizer:
        """Load the text of a tokenizer.json; raises what the library raises when it is not one."""
        return cls(sentencepiece_rule.load(text), special, text=text)

    def encode(self, text: str, *, add_bos: bool | None = None) -> list[int]:
        """Return token ids, which begin with one BOS token if `add_bos` is True; None stands for the model's setting."""
        try:
            ids = self._encode(text)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of the library is no `Exception`
            raise _failure(error, "a text") from error
        bos = self.special.bos
        if (self.special.add_bos if add_bos is None else add_bos) and bos is not None and ids[:1] != [bos]:
            return [bos, *ids]
        return ids

    def _encode(self, text: str) -> list[int]:
        if len(text) > _LONG_TEXT:  # of a batch alone, the library lets other threads run meanwhile: seconds for megabytes
            (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        else:
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        ids: list[int] = encoding.ids
        return ids

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Return the text of `ids`, with the names of special tokens only if `special`."""
        try:
            return str(self._tokenizer.decode(list(ids), skip_special_tokens=not special))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            raise _failure(error, "tokens") from error

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes that a token stands for, which need not be whole characters; the name of a special token, and
        nothing for an id that is no token."""
        piece = self._tokenizer.id_to_token(token)
        if piece is None or token in self._special_of:
            return (piece or "").encode()
        if self._byte_level:
            return bytes(byte for character in piece for byte in _BYTES_OF.get(character, character.encode()))
        if match := _BYTE_PIECE.fullmatch(piece):
            return bytes([int(match[1], 16)])
        return piece.replace(_SPACE, " ").encode()

    def settled_text(self, token: int) -> str | None:
        """Return what a token adds to any text of whole characters, which no later token changes. None where that depends on
        its neighbours, as for the bytes of a character, or is not known of the tokenizer's decoder."""
        try:
            return self._settled_texts[token]
        except KeyError:
            text = self._settled_texts[token] = self._find_settled_text(token)
            return text

    def _find_settled_text(self, token: int) -> str | None:
        if not self._decodes_each_token or _BYTE_PIECE.fullmatch(self._tokenizer.id_to_token(token) or ""):
            return None
        twice = self.decode([token, token])
        text = twice[len(twice) // 2 :]  # the first one may have lost its leading space
        return None if _REPLACEMENT in text else text

    @cached_property
    def _decodes_each_token(self) -> bool:
        """Whether a text is its tokens' texts joined, but for a space before the first one and for bytes that make up
        characters together. True of the decoders of BLOOM and of LLaMA."""
        if self._tokenizer.decoder is None:
            return False
        state = json.loads(self._tokenizer.decoder.__getstate__())
        decoders = state.get("decoders", [state])
        kinds = [decoder["type"] for decoder in decoders]
        if kinds == ["ByteLevel"]:
            return True
        strips = [
            (decoder["content"], decoder["start"] <= 1, decoder["stop"]) for decoder in decoders[3:] if "start" in decoder
        ]
        fused = kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and decoders[0]["pattern"] == {"String": _SPACE}
        return fused and len(strips) == len(kinds[3:]) and strips in ([], [(" ", True, 0)])

    def is_special(self, token: int) -> bool:
        """Whether `decode` leaves a token out."""
        return self._special_of.get(token, False)

    @cached_property
    def _special_of(self) -> dict[int, bool]:
        """The tokens that were added to the vocabulary, and whether each is special."""
        return {token: added.special for token, added in self._tokenizer.get_added_tokens_decoder().items()}

    @cached_property
    def _byte_level(self) -> bool:
        """Whether the vocabulary writes each byte as a character, as BLOOM's does; else it is written as SentencePiece does."""
        state = json.loads(self._tokenizer.decoder.__getstate__())
        return any(decoder["type"] == "ByteLevel" for decoder in state.get("decoders", [state]))


def _failure(error: BaseException, what: str) -> EngineError:
    """The error of a call that the library fails, as it does for settings of a tokenizer.json that it does not check."""
    remedy = "rebuild the engine from a checkpoint whose tokenizer works"
    return EngineError("tokenizer", f"{what} cannot be converted", found=str(error), remedy=remedy)


class Detokenizer:
    """Decodes an answer token by token. For answers that are valid UTF-8, the pieces joined are the text of all tokens.

    Each call decodes a window of tokens. It begins with those of the last finished piece as context, without which a
    SentencePiece token would lose its leading space. The bytes of a character that is not complete are held back. Where
    nothing is held back, most tokens need no decoding: `Tokenizer.settled_text` knows what they add.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._context = 0  # tokens at the window's start whose text was returned
        self._emitted: int | None = 0  # characters of the window's text that were returned; None stands for all

    def push(self, token: int) -> str:
        """Add a token; returns the text that cannot change any more and was not returned before, possibly none."""
        if self._context and self._context == len(self._window):
            settled = self._tokenizer.settled_text(token)
            if settled:
                self._window, self._context, self._emitted = [token], 1, None
                return settled
        if self._emitted is None:
            self._emitted = len(self._tokenizer.decode(self._window))
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
            self._emitted = None
        return piece

    def flush(self) -> str:
        """Return the rest of the text, when no token will follow."""
        if self._emitted is None:
            return ""
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


def _byte_level_alphabet() -> dict[str, bytes]:
    """Return the byte of each character of GPT-2's alphabet: printable bytes are themselves, others come after U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): bytes([byte]) for byte in printable} | {chr(256 + i): bytes([byte]) for i, byte in enumerate(others)}


_BYTES_OF = _byte_level_alphabet()
