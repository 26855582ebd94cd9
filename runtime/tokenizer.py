"""Text to tokens and back. Text of a growing answer comes in pieces of whole characters and ends before a stop string."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path

import tokenizers

from belle_compile.runtime import sentencepiece_rule
from belle_compile.runtime.artifact import SpecialTokens
from belle_compile.runtime.control_tokens import ControlTokens, check_text
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.serving.grammar.grammars import Grammars

_REPLACEMENT = "\ufffd"
# A character has at most 4 bytes, and so at most 4 tokens. Bytes that make no character after more tokens than that never will.
_MOST_PENDING_TOKENS = 8
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")  # how SentencePiece writes a byte that is no character of its vocabulary
_SPACE = "\u2581"  # how SentencePiece writes a space
_LONG_TEXT = 4096  # characters
# Marks are halves of surrogate pairs, which no decoded text has.
_FIRST_MARK, _MOST_MARKS, _OTHER_MARK = 0xD800, 0x700, "\udfff"
_MARK = re.compile("[\ud800-\udfff]")


class Tokenizer:
    """The tokenizer of an engine: its tokenizer.json, and the special tokens of its manifest."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, special: SpecialTokens, *, text: str | None = None) -> None:
        """`text` is the tokenizer.json, for a tokenizer that the library cannot write."""
        # A tokenizer.json may hold settings for truncation and padding, which would cut or pad prompts in silence.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.special = special
        self._text = tokenizer.to_str if text is None else lambda: text
        self._settled_texts: dict[int, str | None] = {}
        self.grammars = Grammars(self._text, special.eos)

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

    def encode(self, text: str, *, add_bos: bool | None = None, control: ControlTokens | None = None) -> list[int]:
        """Return token ids, which begin with one BOS token if `add_bos` is True; None stands for the model's setting.

        Names of special tokens are these tokens; with `control`, as far as its marks in the text allow. Raises `EngineError`
        for a text that UTF-8 cannot express.
        """
        if control is None:
            check_text(text)
        try:
            ids = self._encode(text) if control is None else control.encode(text, self._encode)
        except (KeyboardInterrupt, SystemExit, EngineError):
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

    def control_tokens(self, frame: str = "") -> ControlTokens:
        """Return the special tokens, those of the manifest, and the added ones whose names are in `frame`."""
        own = {self.special.bos, self.special.pad, *self.special.eos}
        ids = {
            added.content: token
            for token, added in self._added.items()
            if added.special or token in own or (added.content and added.content in frame)
        }
        return ControlTokens(self._tokenizer, self._text, sentencepiece_rule.load, ids)

    def vocabulary(self) -> dict[str, int]:
        """The numbers of all tokens, added ones included, by how the tokenizer writes them."""
        numbers: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        return numbers

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
    def special_names(self) -> dict[str, int]:
        """The names of the tokens that `decode` leaves out, and their ids."""
        return {added.content: token for token, added in self._added.items() if added.special}

    @cached_property
    def _special_of(self) -> dict[int, bool]:
        """The tokens that were added to the vocabulary, and whether each is special."""
        return {token: added.special for token, added in self._added.items()}

    @cached_property
    def _added(self) -> dict[int, tokenizers.AddedToken]:
        return dict(self._tokenizer.get_added_tokens_decoder())

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
    """Cuts a text that comes in pieces before the first stop string, which may lie across pieces.

    Special tokens have no text in an answer. A stop string that contains the names of some is found where they stand between
    the pieces: each of these tokens leaves a mark in the text, a character that no text has, and so do the names in the stop
    strings. Marks are removed from what is returned.
    """

    def __init__(self, stops: Sequence[str], special: Mapping[str, int] | None = None) -> None:
        """`special` are the names of tokens that have no text, with their ids."""
        self._stops = tuple(stops)
        self._marked: tuple[str, ...] = ()
        self._marks: dict[int, str] = {}
        if named := [name for name in special or () if any(name in stop for stop in stops)]:
            assert special is not None
            mark_of = {name: chr(_FIRST_MARK + i) for i, name in enumerate(named[:_MOST_MARKS])}
            pattern = re.compile("|".join(map(re.escape, sorted(mark_of, key=len, reverse=True))))
            self._marked = tuple(pattern.sub(lambda match: mark_of[match[0]], stop) for stop in stops)
            self._marks = {token: mark_of.get(name, _OTHER_MARK) for name, token in special.items()}
        self._held = ""  # with marks
        self.matched = False

    def push(self, piece: str, token: int | None = None) -> str:
        """Add a piece, and the token that came with it; returns the text that no stop string can begin in. Sets `matched` at
        the first stop string."""
        added = piece + self._marks.get(token, "") if token is not None else piece
        if not self._stops or not added:
            return piece
        text = self._held + added
        plain = self._unmarked(text)
        ends = [start for stop in self._stops if (start := plain.find(stop)) >= 0]
        ends += [len(self._unmarked(text[:start])) for stop in self._marked if (start := text.find(stop)) >= 0]
        if ends:
            self.matched, self._held = True, ""
            return plain[: min(ends)]
        sure = len(plain) - max(_overlap(plain, stop) for stop in self._stops)
        end = len(text) - max((_overlap(text, stop) for stop in self._marked), default=0)
        sure = min(sure, len(self._unmarked(text[:end])))
        self._held = text[min(end, _place(text, sure) if self._marks else sure) :]
        return plain[:sure]

    def flush(self) -> str:
        """Return the text that was held back because a stop string could begin in it."""
        held, self._held = self._unmarked(self._held), ""
        return held

    def _unmarked(self, text: str) -> str:
        return _MARK.sub("", text) if self._marks else text


def _place(text: str, number: int) -> int:
    """Return the place of character `number` of a text among those that are no marks, or its end."""
    places = (place for place, character in enumerate(text) if not _MARK.match(character))
    return next(islice(places, number, None), len(text))


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
