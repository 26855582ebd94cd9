"""Sentencepiece's rule for equal scores, against its definition, and in the tokenizer of an engine."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers

from belle_compile.runtime.artifact import PromptTemplate
from belle_compile.runtime.chat import ChatEncoder
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.prompt import ChatTemplate
from belle_compile.runtime.sentencepiece_rule import RANKS_KEY, load, segments
from belle_compile.runtime.tokenizer import Detokenizer, Tokenizer
from tests.runtime.fakes import special_tokens

PIECES = {"ab": 0, "bc": 0, "abc": 0, "ca": 1, "abca": 1, "cc": 2, "ccc": 2}


def by_definition(text: str, ranks: dict[str, int]) -> list[str]:
    """Merge the pair of the least rank, the leftmost of equal ones, until no pair is a piece."""
    symbols = list(text)
    while True:
        pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in ranks]
        if not pairs:
            return symbols
        _, i = min(pairs)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]


def test_segments_follow_the_definition() -> None:
    rng = random.Random(3)
    for _ in range(2000):
        text = "".join(rng.choice("abcx") for _ in range(rng.randint(0, 12)))
        assert segments(text, PIECES) == by_definition(text, PIECES), text


def tokenizer_json(ranks: object = None) -> str:
    """Characters a, b, c, the pieces of `PIECES`, bytes, and a space as in sentencepiece."""
    words = ["<unk>", "<s>", "</s>", "<pad>", "a", "b", "c", "\u2581", *PIECES, *(f"<0x{byte:02X}>" for byte in range(256))]
    merges = [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc"), ("c", "a"), ("abc", "a"), ("c", "c"), ("cc", "c"), ("c", "cc")]
    vocab = {word: index for index, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<s>", "</s>"])
    plain = json.loads(tokenizer.to_str())
    plain["model"][RANKS_KEY] = [PIECES.get(word) for word in words] if ranks is None else ranks
    return json.dumps(plain)


def test_a_tokenizer_with_ranks() -> None:
    tokenizer = Tokenizer.from_text(tokenizer_json(), special_tokens())
    pieces = load(tokenizer_json())
    for text in ("bcab", "abcabc", "a ccc b", "aé🙂b</s>bcab", ""):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids, special=True) == text
        detokenizer = Detokenizer(tokenizer)
        assert "".join([*map(detokenizer.push, ids), detokenizer.flush()]) == text.replace("</s>", "")
    assert [pieces.id_to_token(index) for index in tokenizer.encode("bcab")] == by_definition("bcab", PIECES)


def test_text_without_ranks_is_loaded_as_it_is() -> None:
    plain = json.loads(tokenizer_json())
    del plain["model"][RANKS_KEY]
    assert load(json.dumps(plain)).to_str() == tokenizers.Tokenizer.from_str(json.dumps(plain)).to_str()


@pytest.mark.parametrize("ranks", [3, [0], "x", {"ab": 0}])
def test_ranks_that_do_not_fit(tmp_path: Path, ranks: object) -> None:
    (tmp_path / "tokenizer.json").write_text(tokenizer_json(ranks))
    with pytest.raises(EngineError, match="is no tokenizer"):
        Tokenizer.from_file(tmp_path / "tokenizer.json", special_tokens())


def test_names_of_control_tokens_as_text() -> None:
    """The copy of the tokenizer that such texts are encoded with has the same rule."""
    template = ChatTemplate(PromptTemplate("test", "<s>{% for m in messages %}{{ m.content }}</s>{% endfor %}", "<s>", "</s>"))
    tokenizer = Tokenizer.from_text(tokenizer_json(), special_tokens())
    chat = ChatEncoder(template, tokenizer)
    for before, after in (("bcab", "abcabc"), ("a ccc b", ""), ("", "bcab")):
        ids = chat.encode([{"role": "user", "content": f"{before}</s>{after}"}])
        assert (ids[0], ids[-1], ids.count(1), ids.count(2)) == (1, 2, 1, 1)
        bytes_of_name = [tokenizer.encode(character) for character in "</s>"]
        name = [token for token_ids in bytes_of_name for token in token_ids]
        assert ids[1:-1] == [*tokenizer.encode(before), *name, *tokenizer.encode(after)]
        ordinary = [{"role": "user", "content": before + after}]
        assert chat.encode(ordinary) == tokenizer.encode(template.render(ordinary))
