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
from tests.compiler.checkpoint.models import write_json

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


def test_tied_scores_are_noted(tmp_path: Path) -> None:
    model = train(tmp_path, **LLAMA_STYLE)
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model.read_bytes())
    for piece in proto.pieces[-4:]:
        piece.score = 0.0  # as tools that merge two models do; the first merge has it too
        piece.piece *= 2
    model.write_bytes(proto.SerializeToString())
    assert "tokenizer.model: 5 pieces share their score with another" in convert(model)[1][0]


def test_unigram_is_refused(tmp_path: Path) -> None:
    message = r"found a sentencepiece model that is not BPE, expected BPE, .*; put a tokenizer\.json"
    with pytest.raises(CompileError, match=message):
        convert(train(tmp_path, model_type="unigram", hard_vocab_limit=False))


def test_not_a_sentencepiece_model(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(CompileError, match="found a file that sentencepiece cannot read"):
        convert(tmp_path / "tokenizer.model")
