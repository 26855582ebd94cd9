"""Special tokens from the files that state them, and which one is believed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from belle_compile.compiler.checkpoint import open_checkpoint
from belle_compile.compiler.checkpoint.special_tokens import Statements, special_tokens
from tests.compiler.checkpoint.models import LLAMA_CONFIG, byte_tokenizer, write_json, write_small_files
from tests.compiler.checkpoint.test_sentencepiece_model import LLAMA_STYLE, train

TOKENIZER = byte_tokenizer().to_str()


def found(
    config: dict[str, Any],
    generation: dict[str, Any] | None = None,
    tokenizer: dict[str, Any] | None = None,
    tokens_map: dict[str, Any] | None = None,
    *,
    raw: bool = False,
    json: str = TOKENIZER,
) -> dict[str, Any]:
    stated = Statements({"vocab_size": 300} | config, json, generation or {}, tokenizer or {}, tokens_map or {})
    return special_tokens(stated, raw_template=raw)[0]


def test_numbers_alone() -> None:
    assert found({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}) == {
        "bos_token_id": 1,
        "eos_token_ids": [2],
        "pad_token_id": 3,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "add_bos": False,
        "add_bos_raw": False,
    }


def test_nothing_known() -> None:
    assert found({}) == {
        "bos_token_id": None,
        "eos_token_ids": [],
        "pad_token_id": None,
        "bos_token": "",
        "eos_token": "",
        "add_bos": False,
        "add_bos_raw": False,
    }


def test_eos_is_the_union_of_generation_config_and_tokenizer() -> None:
    special = found({"eos_token_id": 9}, {"eos_token_id": [7, 8]}, {"eos_token": "</s>"})
    assert special["eos_token_ids"] == [7, 8, 2] and special["eos_token"] == "</s>"


def test_words_outrank_the_numbers_of_early_llama_conversions() -> None:
    special = found(
        {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1},
        {},
        {"bos_token": {"content": "<s>"}},
        {"eos_token": "</s>", "pad_token": ""},
    )
    assert (special["bos_token_id"], special["eos_token_ids"], special["pad_token_id"]) == (1, [2], None)


@pytest.mark.parametrize("value", [-1, 299, 300, "2", True, None])
def test_ids_that_are_none_count_as_absent(value: object) -> None:
    assert found({"eos_token_id": value, "pad_token_id": value})["eos_token_ids"] == []


def test_added_tokens_beyond_the_embedding_count_as_absent() -> None:
    assert found({"vocab_size": 3}, {}, {"pad_token": "<pad>"})["pad_token_id"] is None


@pytest.mark.parametrize("stated", [{"add_bos_token": True}, {"add_bos_token": False}, {}], ids=str)
def test_bos_goes_before_raw_text_only(stated: dict[str, Any]) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    for template_is_raw in (False, True):
        special = found({"bos_token_id": 1}, {}, stated, raw=template_is_raw, json=tokenizer.to_str())
        assert special["add_bos_raw"] is True and special["add_bos"] is template_is_raw


_TOKENS = {"<s>": 1, "</s>": 2, "<pad>": 3}


@pytest.mark.parametrize("single", [None, "$A", "<s> $A", "<s> $A </s>", "$A </s>", "<pad> $A", "<s> <pad> $A"])
@pytest.mark.parametrize("tokenizer_class", [None, "LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast"])
def test_tokens_around_a_text_are_those_of_transformers(llama: Path, single: str | None, tokenizer_class: str | None) -> None:
    tokenizer = byte_tokenizer()
    if single is not None:
        tokens = [(word, number) for word, number in _TOKENS.items() if word in single]
        tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=tokens)
    (llama / "tokenizer.json").write_text(tokenizer.to_str())
    words = {"bos_token": "<s>", "eos_token": "</s>"} | ({"tokenizer_class": tokenizer_class} if tokenizer_class else {})
    for keys in ({}, {"add_bos_token": True, "add_eos_token": True}, {"add_bos_token": False, "add_eos_token": False}):
        write_json(llama / "tokenizer_config.json", words | keys)
        expected = AutoTokenizer.from_pretrained(llama)("a").input_ids
        checkpoint = open_checkpoint(llama, template="raw")
        ours = [*([1] if checkpoint.special["add_bos"] else []), *tokenizer.encode("a", add_special_tokens=False).ids]
        noted = any("every text that is no chat; engines do not" in note for note in checkpoint.notes)
        assert noted == (ours != expected) and noted == (single not in (None, "$A", "<s> $A"))


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("adds_eos", [True, False])
def test_a_sentencepiece_model_has_what_the_keys_say(llama: Path, adds_bos: bool, adds_eos: bool) -> None:
    (llama / "tokenizer.json").unlink()
    train(llama, **LLAMA_STYLE)
    write_json(llama / "config.json", LLAMA_CONFIG | {"vocab_size": 420})
    keys = {"add_bos_token": adds_bos, "add_eos_token": adds_eos, "bos_token": "<s>", "eos_token": "</s>"}
    write_json(llama / "tokenizer_config.json", keys)
    ids = AutoTokenizer.from_pretrained(llama)("a").input_ids
    checkpoint = open_checkpoint(llama, template="raw")
    assert checkpoint.special["add_bos"] == (ids[0] == 1) == adds_bos
    assert any("'</s>' (2) after every text" in note for note in checkpoint.notes) == (ids[-1] == 2) == adds_eos


def test_a_directory(llama: Path) -> None:
    write_json(llama / "generation_config.json", {"eos_token_id": [2, 3]})
    write_json(llama / "tokenizer_config.json", {"bos_token": "<s>"})
    tokenizer = byte_tokenizer()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    (llama / "tokenizer.json").write_text(tokenizer.to_str())
    assert open_checkpoint(llama).special["eos_token_ids"] == [2, 3]
    assert open_checkpoint(llama).special["add_bos"] is False
    assert open_checkpoint(llama, template="raw").special["add_bos"] is True


EMPTY = ["", None, {}, {"content": ""}]


@pytest.mark.parametrize("word", EMPTY, ids=repr)
def test_empty_words_do_not_outrank_what_the_class_implies(word: object) -> None:
    early = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1}
    words = {"bos_token": word, "eos_token": word, "tokenizer_class": "LLaMATokenizer"}
    for files in ({"tokenizer": words}, {"tokenizer": words, "tokens_map": words}, {"generation": early, "tokenizer": words}):
        special = found(early, **files)
        assert (special["bos_token_id"], special["eos_token_ids"], special["eos_token"]) == (1, [2], "</s>")


@pytest.mark.parametrize("name", ["BloomTokenizerFast", "LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizerFast"])
def test_words_of_classes(name: str) -> None:
    special = found({}, {}, {"tokenizer_class": name})
    assert (special["bos_token"], special["eos_token"]) == ("<s>", "</s>")
    assert special["pad_token_id"] == (3 if name.startswith("Bloom") else None)


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "GPT2Tokenizer", 3, None])
def test_classes_whose_words_the_vocabulary_lacks(name: object) -> None:
    assert found({"bos_token_id": 3}, {}, {"tokenizer_class": name})["bos_token_id"] == 3


def test_an_early_conversion_without_any_words() -> None:
    special = found({"bos_token_id": 0, "eos_token_id": 1}, {"bos_token_id": 0, "eos_token_id": 1})
    assert (special["bos_token_id"], special["eos_token_ids"]) == (1, [2])
    assert found({"bos_token_id": 1, "eos_token_id": 0})["eos_token_ids"] == [0]  # not that signature


WORDS = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize(
    ("config", "generation", "eos"),
    [
        ({}, {"eos_token_id": [2, 1]}, [2, 1]),
        ({}, {"eos_token_id": [1, 7], "_from_model_config": True}, [1, 7, 2]),
        ({"eos_token_id": [1]}, {}, [1, 2]),
        ({}, {"eos_token_id": 1}, [1, 2]),
        ({}, {"eos_token_id": 1, "bos_token_id": 1}, [1, 2]),
        ({}, {"eos_token_id": 1, "_from_model_config": True}, [2]),
        ({}, {"eos_token_id": 1, "bos_token_id": 0}, [2]),
        ({"eos_token_id": 1}, {}, [2]),
        ({"eos_token_id": 2}, {"eos_token_id": 1, "_from_model_config": True}, [2]),
    ],
)
def test_bos_ends_answers_if_the_author_wrote_so(config: dict[str, Any], generation: dict[str, Any], eos: list[int]) -> None:
    assert found(config, generation, WORDS)["eos_token_ids"] == eos


def test_the_map_outranks_the_config_as_in_transformers(tmp_path: Path) -> None:
    config: dict[str, Any] = {"eos_token": "</s>", "bos_token": "<s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    for name, decoder in (("old", {}), ("new", {"added_tokens_decoder": {"2": {"content": "</s>", "special": True}}})):
        folder = write_small_files(tmp_path / name, LLAMA_CONFIG)
        write_json(folder / "tokenizer_config.json", config | decoder)
        write_json(folder / "special_tokens_map.json", {"eos_token": "<pad>", "pad_token": {"content": "<pad>"}})
        expected = AutoTokenizer.from_pretrained(folder).eos_token
        assert found({}, {}, config | decoder, {"eos_token": "<pad>"})["eos_token"] == expected
    assert found({}, {}, config | decoder, {"pad_token": "<pad>"})["pad_token_id"] == 3  # what only the map states


def notes_of(config: dict[str, Any], **files: dict[str, Any]) -> list[str]:
    return special_tokens(Statements({"vocab_size": 300} | config, TOKENIZER, **files), raw_template=False)[1]


def test_files_that_agree_give_no_note() -> None:
    agreeing = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    assert notes_of(agreeing, generation=agreeing, tokenizer_config=WORDS) == []
    assert notes_of({"eos_token_id": 2}, generation={"eos_token_id": [2, 3]}, tokenizer_config=WORDS) == []


def test_disagreements_are_noted_with_every_source() -> None:
    early = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    assert notes_of(early, generation={"pad_token_id": 3}, tokenizer_config=WORDS) == [
        "BOS is '<s>' (1), and files disagree: tokenizer_config.json says '<s>' (1); config.json says '<unk>' (0)",
        "EOS is '</s>' (2), and files disagree: tokenizer_config.json says '</s>' (2); config.json says '<s>' (1)",
        "PAD is '<pad>' (3), and files disagree: generation_config.json says '<pad>' (3); config.json says '<unk>' (0)",
    ]
    assert notes_of({"eos_token_id": 9}, generation={"eos_token_id": [2, 7]}, tokens_map={"eos_token": "<pad>"}) == [
        "EOS is '</s>' (2), '$' (7), '<pad>' (3), and files disagree: special_tokens_map.json says '<pad>' (3); "
        "generation_config.json says '</s>' (2), '$' (7); config.json says '&' (9)"
    ]


def test_the_post_processor_states_bos_where_nothing_else_does() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = found({}, json=tokenizer.to_str(), raw=True)
    assert special["bos_token_id"] == 1 and special["add_bos"]
    assert found({"bos_token_id": 3}, json=tokenizer.to_str())["bos_token_id"] == 3


def test_notes_reach_the_checkpoint(llama: Path) -> None:
    write_json(llama / "tokenizer_config.json", {"bos_token": "<pad>"})
    (note,) = open_checkpoint(llama).notes
    assert note == "BOS is '<pad>' (3), and files disagree: tokenizer_config.json says '<pad>' (3); config.json says '<s>' (1)"
