"""Special tokens of a checkpoint: who is believed where its files disagree, and notes that they do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

Object = Mapping[str, Any]

# The words that classes of Transformers have where tokenizer_config.json states none, by the class in lower case, without
# "fast". They count only if the vocabulary has them.
_CLASS_WORDS: Mapping[str, Object] = {
    "llamatokenizer": {"bos_token": "<s>", "eos_token": "</s>"},
    "codellamatokenizer": {"bos_token": "<s>", "eos_token": "</s>"},
    "bloomtokenizer": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
    "gpt2tokenizer": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
}
GENERATION_CONFIG = "generation_config.json"
_TITLES = {"bos": "BOS", "eos": "EOS", "pad": "PAD"}


@dataclass(frozen=True)
class Statements:
    """All that a checkpoint says about its special tokens.

    The fields are the contents of config.json, generation_config.json, tokenizer_config.json, special_tokens_map.json and
    tokenizer.json, and the words that the tokenizer's format implies. For a GGUF file, all but tokenizer.json are made from its
    metadata, and `metadata_of` is its name.
    """

    config: Object
    tokenizer_json: str
    generation: Object = field(default_factory=dict)
    tokenizer_config: Object = field(default_factory=dict)
    tokens_map: Object = field(default_factory=dict)
    implied: Object = field(default_factory=dict)
    metadata_of: str = ""


class _Files:
    """The statements with what is needed to look tokens up. Ids outside of the vocabulary, such as pad -1, count as absent, and
    so do empty words: "", null and {}."""

    def __init__(self, stated: Statements) -> None:
        self.stated, self.tokenizer = stated, Tokenizer.from_str(stated.tokenizer_json)
        size = stated.config.get("vocab_size")
        self._vocab_size = size if type(size) is int else self.tokenizer.get_vocab_size()

    def by_word(self, source: Object, kind: str) -> list[int]:
        word = word_of(source.get(f"{kind}_token"))
        return self._existing([self.tokenizer.token_to_id(word)]) if word else []

    def by_number(self, source: Object, kind: str) -> list[int]:
        value = source.get(f"{kind}_token_id")
        return self._existing(value if isinstance(value, list) else [value])

    def by_post_processor(self, kind: str) -> list[int]:
        """The token that tokenizer.json puts before every text."""
        return self._existing([*self.added[0][:1]]) if kind == "bos" else []

    @cached_property
    def added(self) -> tuple[list[int], list[int]]:
        """The ids that Transformers puts before and after every text that is no chat.

        Where there is a tokenizer.json, its post-processor alone decides: Transformers 5 then drops add_bos_token and
        add_eos_token of tokenizer_config.json (`PreTrainedTokenizerBase._from_pretrained`). Otherwise these keys decide. A
        tokenizer.model without them adds BOS, as in Transformers 4, for which such releases were made, and not in 5.
        """
        stated = self.stated
        if not stated.metadata_of and "add_bos_token" not in stated.implied:
            plain, whole = (self.tokenizer.encode("a", add_special_tokens=each).ids for each in (False, True))
            starts = (start for start in range(len(whole)) if whole[start : start + len(plain)] == plain)
            start = next(starts, len(whole))
            return whole[:start], whole[start + len(plain) :]
        sources = (stated.tokenizer_config, stated.implied)
        first, last = (
            next((value for source in sources if isinstance(value := source.get(f"add_{kind}_token"), bool)), False)
            for kind in ("bos", "eos")
        )
        bos, eos = (_first(_stating(self, (*_WORDS, *_NUMBERS), kind)) for kind in ("bos", "eos"))
        return [bos] if first and bos is not None else [], [eos] if last and eos is not None else []

    def class_words(self) -> Object:
        name = self.stated.tokenizer_config.get("tokenizer_class")
        return _CLASS_WORDS.get(name.lower().removesuffix("fast"), {}) if isinstance(name, str) else {}

    def early_words(self) -> Object:
        """The words of a LLaMA conversion of early 2023, whose config.json names <unk> as BOS and <s> as EOS."""
        config = self.stated.config
        numbers = [*self.by_number(config, "bos"), *self.by_number(config, "eos")]
        words = _CLASS_WORDS["llamatokenizer"]
        return words if numbers == [self.tokenizer.token_to_id("<unk>"), self.tokenizer.token_to_id("<s>")] else {}

    def text(self, index: int | None) -> str:
        return "" if index is None else self.tokenizer.id_to_token(index) or ""

    def shown(self, ids: list[int]) -> str:
        return ", ".join(f"{self.tokenizer.id_to_token(index)!r} ({index})" for index in ids)

    def _existing(self, ids: list[Any]) -> list[int]:
        known = [v for v in ids if type(v) is int and 0 <= v < self._vocab_size and self.tokenizer.id_to_token(v) is not None]
        return list(dict.fromkeys(known))


@dataclass(frozen=True)
class _Source:
    """One of the places that state special tokens: its name in notes, and how the ids of a kind are read from it.

    An `implied` source states what holds unless a file says otherwise, so that it disagrees with nobody.
    """

    name: str
    read: Callable[[_Files, str], list[int]]
    implied: bool = False


# Who is believed where files disagree, best first.
#
# Words of the tokenizer's files outrank the numbers in configs: LLaMA conversions of early 2023 state BOS 0 and EOS 1 in
# config.json although their tokenizer has <s> = 1 and </s> = 2. Among the words, the order is that of Transformers, which reads
# special_tokens_map.json over tokenizer_config.json unless the latter has an added_tokens_decoder. Among the numbers,
# generation_config.json outranks config.json, as in Transformers.
#
# With an added_tokens_decoder, the map counts only where tokenizer_config.json states nothing.
_UNREAD_MAP = _Source("special_tokens_map.json", lambda files, kind: files.by_word(_map(files.stated, newer=True), kind))
_WORDS: tuple[_Source, ...] = (
    _Source("special_tokens_map.json", lambda files, kind: files.by_word(_map(files.stated, newer=False), kind)),
    _Source("tokenizer_config.json", lambda files, kind: files.by_word(files.stated.tokenizer_config, kind)),
    _UNREAD_MAP,
    _Source("the tokenizer's format", lambda files, kind: files.by_word(files.stated.implied, kind), implied=True),
    _Source("the tokenizer's class", lambda files, kind: files.by_word(files.class_words(), kind), implied=True),
    _Source("the vocabulary", lambda files, kind: files.by_word(files.early_words(), kind), implied=True),
)
_NUMBERS: tuple[_Source, ...] = (
    _Source(GENERATION_CONFIG, lambda files, kind: files.by_number(files.stated.generation, kind)),
    _Source("config.json", lambda files, kind: files.by_number(files.stated.config, kind)),
)
_LAST: tuple[_Source, ...] = (
    _Source("the post-processor of tokenizer.json", lambda files, kind: files.by_post_processor(kind)),
)
# The words that Transformers renders chat templates with.
_RENDERED = tuple(source for source in _WORDS if source is not _UNREAD_MAP)
PRECEDENCE: tuple[_Source, ...] = (*_WORDS, *_NUMBERS, *_LAST)


def special_tokens(stated: Statements, *, raw_template: bool, own_template: bool = False) -> tuple[dict[str, Any], list[str]]:
    """Return bos_token_id, eos_token_ids, pad_token_id, bos_token, eos_token, add_bos and add_bos_raw (see `Checkpoint`), and
    notes on what the files disagree about.

    BOS and PAD are those of the first source in `PRECEDENCE` that states one. An answer ends at the ids of the first source of
    numbers, and at the first source's word. A chat template of the checkpoint's own (`own_template`) is rendered with words of
    the tokenizer only, as in Transformers, where one that it lacks is empty.
    """
    files = _Files(stated)
    bos_sources, pad_sources = _stating(files, PRECEDENCE, "bos"), _stating(files, PRECEDENCE, "pad")
    bos, pad = _first(bos_sources), _first(pad_sources)
    words = _stating(files, _WORDS, "eos")
    eos_word = _first(words)
    bos_by_word = _first(_stating(files, _WORDS, "bos"))
    numbers = [
        (name, _without_shifted(files, name, ids, eos_word, bos_by_word)) for name, ids in _stating(files, _NUMBERS, "eos")
    ]
    numbers = [(name, ids) for name, ids in numbers if ids]
    eos = list(dict.fromkeys([*(numbers[0][1] if numbers else []), *([eos_word] if eos_word is not None else [])]))
    before, after = files.added
    add_bos_raw = bos is not None and before == [bos]
    if own_template:
        first_bos, first_eos = (_first(_stating(files, _RENDERED, kind)) for kind in ("bos", "eos"))
    else:
        first_bos, first_eos = bos, eos_word if eos_word is not None else next(iter(eos), None)
    special = {
        "bos_token_id": bos,
        "eos_token_ids": eos,
        "pad_token_id": pad,
        "bos_token": files.text(first_bos),
        "eos_token": files.text(first_eos),
        # A chat template contains BOS if its model needs one, and BELLE's models were trained without BOS.
        "add_bos": add_bos_raw and raw_template,
        "add_bos_raw": add_bos_raw,
    }
    notes = [
        *_disagreement(files, "bos", bos_sources, [] if bos is None else [bos]),
        *_disagreement(files, "eos", _stating(files, (*_WORDS, *_NUMBERS), "eos"), eos),
        *_disagreement(files, "pad", pad_sources, [] if pad is None else [pad]),
        *(_not_added(files, [] if add_bos_raw else before, after) if raw_template else []),
    ]
    return special, notes


def word_of(token: Any) -> str:
    """The text of a token that a file states as a string or as {"content": string, ...}; empty if it states none."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def _map(stated: Statements, *, newer: bool) -> Object:
    """special_tokens_map.json if it is of a release with (`newer`) or without an added_tokens_decoder, else nothing."""
    return stated.tokens_map if newer == ("added_tokens_decoder" in stated.tokenizer_config) else {}


def _stating(files: _Files, sources: tuple[_Source, ...], kind: str) -> list[tuple[str, list[int]]]:
    """The names of the sources that state a token of this kind, with its ids; an implied one only if it is the first."""
    stating: list[tuple[str, list[int]]] = []
    for source in sources:
        if (ids := source.read(files, kind)) and not (source.implied and stating):
            stating.append((source.name, ids))
    return stating


def _first(sources: list[tuple[str, list[int]]]) -> int | None:
    return sources[0][1][0] if sources else None


def _without_shifted(files: _Files, source: str, ids: list[int], eos_word: int | None, bos_word: int | None) -> list[int]:
    """The EOS ids of a config without the tokenizer's BOS if early conversions or Transformers put it there.

    It stays if the model's author wrote it: as part of a list, or alone in a generation_config.json that was not derived from
    config.json and does not state another BOS than the tokenizer.
    """
    if bos_word is None or eos_word in (None, bos_word) or len(ids) > 1:
        return ids
    stated = files.stated.generation if source == GENERATION_CONFIG else files.stated.config
    if isinstance(stated.get("eos_token_id"), list):
        return ids
    derived = stated is files.stated.config or stated.get("_from_model_config") is True
    shifted = files.by_number(stated, "bos") not in ([], [bos_word])
    return [index for index in ids if index != bos_word] if derived or shifted else ids


def _disagreement(files: _Files, kind: str, sources: list[tuple[str, list[int]]], used: list[int]) -> list[str]:
    """A note if a source states another token than the one that is used, or ends answers at fewer or other tokens."""
    if all(set(ids) == set(used) for _, ids in sources):
        return []
    if kind == "eos" and all(set(ids) <= set(used) for _, ids in sources) and any(set(ids) == set(used) for _, ids in sources):
        return []
    metadata = files.stated.metadata_of
    named = dict.fromkeys((f"the metadata of {metadata}" if metadata else name, files.shown(ids)) for name, ids in sources)
    stated = "; ".join(f"{name} says {shown}" for name, shown in named)
    return [f"{_TITLES[kind]} is {files.shown(used)}, and files disagree: {stated}"]


def _not_added(files: _Files, before: list[int], after: list[int]) -> list[str]:
    """A note on tokens that Transformers puts around texts, and engines do not."""
    each = [f"{files.shown(ids)} {where}" for ids, where in ((before, "before"), (after, "after")) if ids]
    return [f"Transformers puts {' and '.join(each)} every text that is no chat; engines do not"] if each else []
