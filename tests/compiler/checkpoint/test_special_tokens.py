"""Special tokens from the files that state them, and which one is believed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from belle_compile.compiler.checkpoint import open_checkpoint
from belle_compile.compiler.checkpoint.special_tokens import special_tokens
from tests.compiler.checkpoint.models import byte_tokenizer, write_json

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
    return special_tokens(
        {"vocab_size": 300} | config, generation or {}, tokenizer or {}, tokens_map or {}, json, raw_template=raw
    )


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


@pytest.mark.parametrize(("stated", "raw"), [({"add_bos_token": True}, True), ({"add_bos_token": False}, False), ({}, True)])
def test_bos_goes_before_raw_text_only(stated: dict[str, Any], raw: bool) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    for template_is_raw in (False, True):
        special = found({"bos_token_id": 1}, {}, stated, raw=template_is_raw, json=tokenizer.to_str())
        assert special["add_bos_raw"] is raw and special["add_bos"] is (raw and template_is_raw)


def test_a_directory(llama: Path) -> None:
    write_json(llama / "generation_config.json", {"eos_token_id": [2, 3]})
    write_json(llama / "tokenizer_config.json", {"add_bos_token": True, "bos_token": "<s>"})
    assert open_checkpoint(llama).special["eos_token_ids"] == [2, 3]
    assert open_checkpoint(llama).special["add_bos"] is False
    assert open_checkpoint(llama, template="raw").special["add_bos"] is True
