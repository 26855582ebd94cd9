"""Keeps the names of control tokens that users write apart from those that a prompt template writes."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import tokenizers

from belle_compile.runtime.errors import EngineError

_MARK = "\udfff"  # half of a surrogate pair, which no text has that can be encoded
_SURROGATE = re.compile("[\ud800-\udfff]")


def check_text(text: str, what: str = "the prompt", *, stage: str = "request") -> None:
    """Raise `EngineError` for a text that UTF-8 cannot express: one with half of a surrogate pair."""
    if half := _SURROGATE.search(text):
        found = f"half of a surrogate pair (U+{ord(half[0]):04X}) as character {half.start()}"
        remedy = "decode the text as what it is, or with errors='replace'"
        raise EngineError(stage, what, found=found, expected="text that UTF-8 can express", remedy=remedy)


class ControlTokens:
    """Tokens by which a prompt tells the model who speaks, such as <|im_end|>. Their names in messages are text.

    `mark` puts marks into messages before they are rendered: one into each name of a control token, and one where a message
    begins or ends with a part of a name, to which the template could add the rest. Names without a mark are then those of the
    template. Where there are others, `encode` gives the template's ones new names that no text has, in the text and in a copy
    of the tokenizer. To this copy the old names are text like any other, and the ids of everything else stay what they are:
    also where a piece of the vocabulary spans the border between the template's text and a message.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        text: Callable[[], str],
        load: Callable[[str], tokenizers.Tokenizer],
        ids: Mapping[str, int],
    ) -> None:
        """`text` is the tokenizer.json of `tokenizer`, which `load` loads. `ids` are the names of control tokens."""
        self._tokenizer, self._text, self._load = tokenizer, text, load
        self._ids = {name: token for name, token in ids.items() if len(name) > 1}  # one character has no place for a mark
        self._names = sorted(self._ids, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, self._names)) or r"(?!)")
        self._beginnings = {name[:size] for name in self._ids for size in range(1, len(name))}
        self._ends = {name[size:] for name in self._ids for size in range(1, len(name))}
        self._longest = max(map(len, self._ids), default=1)
        added = tokenizer.get_added_tokens_decoder()
        # Whether the normalizer can make a name out of other characters, such as those of full width.
        self._normalized = tokenizer.normalizer is not None and any(added[token].normalized for token in self._ids.values())

    def may_copy(self, data: bytes) -> bool:
        """Whether a text in JSON may be the first one that the copy of the tokenizer is needed for, which takes seconds to make
        for a vocabulary of 250,000 pieces."""
        return "_copy" not in self.__dict__ and (b"\\u" in data or any(name.encode() in data for name in self._names))

    def mark(self, value: Any) -> Any:
        """Return a text, or what messages are made of, with marks. Raises `EngineError` for what is no text in UTF-8."""
        if isinstance(value, str):
            return self._mark_text(value)
        if isinstance(value, Mapping):
            return {key: self.mark(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.mark(item) for item in value]
        return value

    def encode(self, marked: str, encode_text: Callable[[str], list[int]]) -> list[int]:
        """Return the ids of a text with marks, in which the names without marks are control tokens. `encode_text` encodes texts
        in which all names are."""
        text = marked.replace(_MARK, "")
        check_text(text)
        if len(text) == len(marked):
            return encode_text(text)
        own = [match.span() for match in self._pattern.finditer(marked)]
        if not self._normalized and len(own) == sum(1 for _ in self._pattern.finditer(text)):
            return encode_text(text)
        plain = _encoding(self._tokenizer, text)
        controls = set(self._ids.values())
        parsed = [offsets for token, offsets in zip(plain.ids, plain.offsets, strict=True) if token in controls]
        pieces, end = [], 0
        for start, stop in own:
            first = start - marked.count(_MARK, 0, start)
            if any(low <= first and first + stop - start <= high for low, high in parsed):
                pieces += [marked[end:start], self._renamed[marked[start:stop]]]
                end = stop
        pieces.append(marked[end:])
        return list(_encoding(self._copy, "".join(pieces).replace(_MARK, "")).ids)

    def _mark_text(self, text: str) -> str:
        check_text(text)
        if not text:
            return text
        places = {match.start() + 1 for match in self._pattern.finditer(text)}
        if self._normalized:
            encoding = _encoding(self._tokenizer, text)
            controls = set(self._ids.values())
            places |= {start + 1 for token, (start, _) in zip(encoding.ids, encoding.offsets, strict=True) if token in controls}
        sizes = range(1, min(self._longest, len(text)) + 1)
        if any(text[:size] in self._ends for size in sizes):
            places.add(0)
        if any(text[-size:] in self._beginnings for size in sizes):
            places.add(len(text))
        pieces, end = [], 0
        for place in sorted(places):
            pieces += [text[end:place], _MARK]
            end = place
        return "".join([*pieces, text[end:]])

    @cached_property
    def _renamed(self) -> dict[str, str]:
        """Names that nobody can write, since nobody knows them."""
        secret = secrets.token_hex(8)
        return {name: f"\ufdd0{secret}-{token}\ufdd1" for name, token in self._ids.items()}

    @cached_property
    def _copy(self) -> tokenizers.Tokenizer:
        """The tokenizer, in which control tokens have their new names."""
        new, plain = self._renamed, json.loads(self._text())
        for added in plain["added_tokens"]:
            if added["content"] in new:
                added |= {"content": new[added["content"]], "normalized": False}
        model = plain["model"]
        vocabulary = model["vocab"]
        if isinstance(vocabulary, dict):
            model["vocab"] = {new.get(piece, piece): token for piece, token in vocabulary.items()}
        else:
            model["vocab"] = [[new.get(piece, piece), *score] for piece, *score in vocabulary]
        if "merges" in model:
            model["merges"] = [merge for merge in model["merges"] if _merged(merge) not in new]
        if model.get("unk_token") in new:
            model["unk_token"] = new[model["unk_token"]]
        plain["post_processor"] = None
        copy = self._load(json.dumps(plain))
        wrong = [name for name, token in self._ids.items() if copy.token_to_id(new[name]) != token]
        assert not wrong, f"control tokens with other ids: {wrong}"
        copy.no_truncation()
        copy.no_padding()
        return copy


def _encoding(tokenizer: tokenizers.Tokenizer, text: str) -> tokenizers.Encoding:
    """Encode a text, with the places of its tokens. Of a batch, the library lets other threads run meanwhile."""
    return tokenizer.encode_batch([text], add_special_tokens=False)[0]


def _merged(merge: str | list[str]) -> str:
    """Return the piece that a rule of a BPE model makes of two."""
    return "".join(merge.split(" ") if isinstance(merge, str) else merge)
