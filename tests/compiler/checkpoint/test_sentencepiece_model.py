"""tokenizer.model becomes a tokenizer.json with sentencepiece's own ids."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer

from belle_compile.compiler.checkpoint import open_checkpoint
from belle_compile.compiler.checkpoint.sentencepiece_model import convert
from belle_compile.compiler.errors import CompileError
from belle_compile.runtime.sentencepiece_rule import RANKS_KEY, load
from tests.compiler.checkpoint.models import LLAMA_CONFIG, write_json

TEXT = [
    "the quick brown fox jumps over the lazy dog",
    "hello world, this is a test of tokens",
    "def f(x): return x + 1",
    "写一首关于春天的诗，北京的春天",
    "今天天气怎么样，中国人民",
    "Human: hello Assistant: hi there",
] * 20
ALPHABET = "the quick brown fox over 写一首关于春天的诗中国人民今天天气 \n  12é🙂ﬁ:"
LLAMA_STYLE = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}


def train(directory: Path, **options: Any) -> Path:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=420,
        byte_fallback=True,
        **{"model_type": "bpe", "minloglevel": 2, "num_threads": 1, **options},
    )
    return directory / "tokenizer.model"


@pytest.mark.parametrize(
    "options",
    [LLAMA_STYLE, {}, LLAMA_STYLE | {"add_dummy_prefix": False}, LLAMA_STYLE | {"user_defined_symbols": ["<user>"]}],
    ids=["llama", "nfkc and squeezed spaces", "no prefix space", "user symbol"],
)
def test_ids_and_text_equal_those_of_sentencepiece(tmp_path: Path, options: dict[str, Any]) -> None:
    model = train(tmp_path, **options)
    text, notes = convert(model)
    converted, reference = Tokenizer.from_str(text), sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert notes == []
    rng = random.Random(0)
    for _ in range(300):
        sample = "".join(rng.choice(ALPHABET) for _ in range(rng.randint(0, 40)))
        ids = converted.encode(sample, add_special_tokens=False).ids
        assert ids == reference.encode(sample), sample
        assert converted.decode(ids) == reference.decode(ids), sample
    assert converted.token_to_id("<s>") == 1 and converted.encode("a <s>", add_special_tokens=True).ids[0] != 1


def test_a_directory_with_only_tokenizer_model(llama: Path) -> None:
    (llama / "tokenizer.json").unlink()
    model = train(llama, **LLAMA_STYLE)
    write_json(llama / "config.json", {"model_type": "llama", "vocab_size": 422})
    write_json(llama / "added_tokens.json", {"<pad>": 420})
    write_json(llama / "tokenizer_config.json", {"added_tokens_decoder": {"421": {"content": "<turn>", "special": False}}})
    checkpoint = open_checkpoint(llama)
    tokenizer = Tokenizer.from_str(checkpoint.tokenizer_json)
    assert tokenizer.token_to_id("<pad>") == 420 and tokenizer.token_to_id("<turn>") == 421
    prompt = "Human: \n中国人民\n\nAssistant: \n"
    assert tokenizer.encode(prompt).ids == sentencepiece.SentencePieceProcessor(model_file=str(model)).encode(prompt)
    assert checkpoint.special["bos_token"] == "<s>" and checkpoint.special["eos_token_ids"] == [2]
    assert checkpoint.special["add_bos"] is False and checkpoint.special["add_bos_raw"] is True
    assert {"tokenizer.model", "added_tokens.json", "tokenizer_config.json"} <= set(checkpoint.digests())
    assert open_checkpoint(llama).tokenizer_json == checkpoint.tokenizer_json


def test_added_token_at_another_id(llama: Path) -> None:
    (llama / "tokenizer.json").unlink()
    train(llama, **LLAMA_STYLE)
    write_json(llama / "added_tokens.json", {"<pad>": 500})
    with pytest.raises(CompileError, match=r"added token '<pad>' of .*: found id 500 stated for it, expected id 420"):
        open_checkpoint(llama)


def test_not_legacy_puts_one_space_before_the_first_text_only(tmp_path: Path) -> None:
    text, _ = convert(train(tmp_path, **LLAMA_STYLE), legacy=False)
    pieces = Tokenizer.from_str(text).encode("hello<s>hello", add_special_tokens=False).tokens
    assert pieces[0].startswith("▁") and not pieces[pieces.index("<s>") + 1].startswith("▁")


def extended(model: Path, how: str) -> Path:
    """Give pieces of the model equal scores, as tools do that extend a vocabulary."""
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model.read_bytes())
    have = {piece.piece for piece in proto.pieces}
    merged = [piece for piece in proto.pieces if piece.type == 1 and len(piece.piece) > 1]
    if how == "all equal":
        for piece in merged:
            piece.score = -1.0
    elif how == "two groups":
        for piece in merged:
            piece.score = -float(len(piece.piece) % 2)
    else:
        starts = [(text, i) for text in TEXT for i in range(len(text) - 1) if text[i] >= "\u4e00"]
        words = {text[i : i + size] for text, i in starts for size in (2, 3, 4)}
        for word in sorted(words - have):
            proto.pieces.add(piece=word, score=0.0 if how == "appended first" else -1e6)
    model.write_bytes(proto.SerializeToString())
    return model


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("how", ["appended first", "appended last", "all equal", "two groups"])
def test_equal_scores_give_the_ids_of_sentencepiece(tmp_path: Path, how: str, legacy: bool) -> None:
    model = extended(train(tmp_path, **LLAMA_STYLE), how)
    text, notes = convert(model, legacy=legacy)
    tokenizer = load(text)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(model))
    plain, differing = Tokenizer.from_str(text), 0
    rng = random.Random(1)
    for sample in [*TEXT, *("".join(rng.choice(ALPHABET) for _ in range(rng.randint(1, 60))) for _ in range(300))]:
        if not legacy and sample.startswith(" "):
            continue  # without legacy, no space is added before a space
        ids = tokenizer.encode(sample, add_special_tokens=False).ids
        assert ids == reference.encode(sample), sample
        assert tokenizer.decode(ids) == reference.decode(ids)
        differing += plain.encode(sample, add_special_tokens=False).ids != ids
    assert notes == []
    assert differing > 0 or how == "appended last", "or the rule would not be needed"


def test_special_tokens_are_found_before_the_rule_applies(tmp_path: Path) -> None:
    tokenizer = load(convert(extended(train(tmp_path, **LLAMA_STYLE), "all equal"))[0])
    ids = tokenizer.encode("hello</s>hello<s>", add_special_tokens=False).ids
    assert ids[-1] == 1 and ids.count(2) == 1 and tokenizer.decode(ids) == "hello hello"


def test_ranks_pass_through_a_checkpoint_and_back(llama: Path) -> None:
    (llama / "tokenizer.json").unlink()
    model = extended(train(llama, **LLAMA_STYLE), "all equal")
    size = sentencepiece.SentencePieceProcessor(model_file=str(model)).vocab_size()
    write_json(llama / "config.json", LLAMA_CONFIG | {"vocab_size": size + 2})
    write_json(llama / "added_tokens.json", {"<turn>": size})
    first = open_checkpoint(llama)
    assert RANKS_KEY in first.tokenizer_json
    (llama / "tokenizer.json").write_text(first.tokenizer_json, encoding="utf-8")  # that of an engine
    write_json(llama / "tokenizer_config.json", {"pad_token": "<pad>"})
    again = open_checkpoint(llama)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(model))
    for checkpoint in (first, again):
        assert load(checkpoint.tokenizer_json).encode(TEXT[3], add_special_tokens=False).ids == reference.encode(TEXT[3])
        assert load(checkpoint.tokenizer_json).token_to_id("<turn>") == size
    assert load(again.tokenizer_json).token_to_id("<pad>") == size + 1


def test_models_without_equal_scores_have_no_ranks(tmp_path: Path) -> None:
    assert RANKS_KEY not in convert(train(tmp_path, **LLAMA_STYLE))[0]


def test_unigram_is_refused(tmp_path: Path) -> None:
    message = r"found a sentencepiece model that is not BPE, expected BPE, .*; put a tokenizer\.json"
    with pytest.raises(CompileError, match=message):
        convert(train(tmp_path, model_type="unigram", hard_vocab_limit=False))


def test_not_a_sentencepiece_model(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(CompileError, match="found a file that sentencepiece cannot read"):
        convert(tmp_path / "tokenizer.model")
