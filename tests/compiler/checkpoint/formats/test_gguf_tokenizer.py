"""Tokenizers from GGUF metadata: byte-level ones split as named, sentencepiece ones equal to their model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer, pre_tokenizers

from belle_compile.compiler.checkpoint.formats.gguf_tokenizer import gguf_tokenizer
from belle_compile.compiler.errors import CompileError
from belle_compile.runtime.sentencepiece_rule import load
from tests.compiler.checkpoint.test_sentencepiece_model import LLAMA_STYLE, TEXT, extended, train


def getter(**fields: Any) -> Any:
    return lambda key, default=None: fields.get(key.removeprefix("tokenizer.ggml."), default)


@pytest.mark.parametrize(
    ("pre", "tokens"),
    [
        ("gpt-2", ["Ġ", "Ġ12", "Ġ34", "<|end|>"]),
        ("smollm", ["ĠĠ", "1", "2", "Ġ", "3", "4", "<|end|>"]),
        ("llama-bpe", ["Ġ", "Ġ", "12", "Ġ", "34", "<|end|>"]),
    ],
)
def test_numbers_are_split_as_the_name_says(pre: str, tokens: list[str]) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = ["1 2", "3 4", "Ġ Ġ", "Ġ 12", "Ġ 34"]
    words = [*alphabet, *(merge.replace(" ", "") for merge in merges), "<|end|>"]
    text = gguf_tokenizer(
        Path("m.gguf"), getter(model="gpt2", pre=pre, tokens=words, merges=merges, token_type=[1] * (len(words) - 1) + [3])
    )
    tokenizer = Tokenizer.from_str(text)
    ids = tokenizer.encode("  12 34<|end|>", add_special_tokens=False)
    assert ids.tokens == tokens
    assert tokenizer.decode(ids.ids, skip_special_tokens=False) == "  12 34<|end|>"


@pytest.mark.parametrize("token", ["<|im_end|>", "<end_of_turn>", "<|eot_id|>"])
def test_tokens_that_end_turns_are_special_whatever_their_type(token: str) -> None:
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), token]
    text = gguf_tokenizer(
        Path("m.gguf"), getter(model="gpt2", pre="gpt-2", tokens=words, merges=[], token_type=[1] * len(words))
    )
    assert Tokenizer.from_str(text).encode(f"a{token}b", add_special_tokens=False).tokens == ["a", token, "b"]


@pytest.mark.parametrize("how", ["", "all equal", "appended first"])
def test_sentencepiece(tmp_path: Path, how: str) -> None:
    model = train(tmp_path, **LLAMA_STYLE)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(extended(model, how) if how else model))
    size = range(reference.vocab_size())
    types = [2 if reference.is_unknown(i) else 3 if reference.is_control(i) else 6 if reference.is_byte(i) else 1 for i in size]
    text = gguf_tokenizer(
        Path("m.gguf"),
        getter(
            model="llama",
            tokens=[reference.id_to_piece(i) for i in size],
            scores=[reference.get_score(i) for i in size],
            token_type=types,
            unknown_token_id=0,
        ),
    )
    tokenizer = load(text)
    for sample in [*TEXT[:6], "  12 🙂 unseen é", "", "\n"]:
        assert tokenizer.encode(sample, add_special_tokens=False).ids == reference.encode(sample)


def test_merges_that_do_not_fit() -> None:
    with pytest.raises(CompileError, match=r"found metadata that makes no tokenizer \(the merge of 'a' and 'b' is not"):
        gguf_tokenizer(Path("m.gguf"), getter(model="gpt2", pre="gpt-2", tokens=["a", "b"], merges=["a b"]))


def test_no_tokens() -> None:
    with pytest.raises(CompileError, match=r"tokenizer of m\.gguf: found no tokenizer\.ggml\.tokens in its metadata, expected"):
        gguf_tokenizer(Path("m.gguf"), getter())
