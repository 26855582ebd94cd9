"""Tokens that only the files beside a tokenizer.json state get the ids that Transformers gives them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from belle_compile.compiler.checkpoint import open_checkpoint
from belle_compile.compiler.errors import CompileError
from tests.compiler.checkpoint.models import LLAMA_CONFIG, write_json, write_small_files, write_weights

FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
WORDS = ("<|im_start|>", "<|im_end|>", "[PAD]", "<tool>", " <tool> ", "<unk>", "</s>", "<extra>", "<image>", "Ünï")


def token(content: str, **flags: bool) -> dict[str, Any]:
    return {
        "content": content,
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": True,
    } | flags


TYPED = {"__type": "AddedToken"} | token("<tool>", lstrip=True)
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "decoder": {"tokenizer_config": {"added_tokens_decoder": {"260": token("<|im_start|>"), "261": token("<|im_end|>")}}},
    "decoder, out of order": {
        "tokenizer_config": {
            "added_tokens_decoder": {"262": token("[PAD]"), "260": token("<tool>"), "261": token("<|im_end|>")}
        }
    },
    "decoder, not special": {"tokenizer_config": {"added_tokens_decoder": {"260": token("<tool>", special=False)}}},
    "decoder that strips": {
        "tokenizer_config": {"added_tokens_decoder": {"260": token("<tool>", lstrip=True, rstrip=True), "261": token("Ünï")}}
    },
    "decoder with other flags": {"tokenizer_config": {"added_tokens_decoder": {"2": token("</s>", rstrip=True)}}},
    "decoder and words of its own": {
        "tokenizer_config": {"added_tokens_decoder": {"260": token("<tool>")}, "pad_token": "[PAD]", "eos_token": "<|im_end|>"},
        "special_tokens_map": {"unk_token": "<extra>"},
    },
    "added_tokens.json": {"added_tokens": {"<|im_start|>": 260, "<|im_end|>": 261}},
    "added_tokens.json and a map": {
        "added_tokens": {"<|im_end|>": 261, "<|im_start|>": 260},
        "special_tokens_map": {
            "eos_token": "<|im_end|>",
            "pad_token": token("[PAD]"),
            "additional_special_tokens": ["<extra>"],
        },
    },
    "added_tokens.json that a decoder outranks": {
        "added_tokens": {"<|im_start|>": 260},
        "tokenizer_config": {"added_tokens_decoder": {"260": token("<tool>")}},
    },
    "words of tokenizer_config.json": {"tokenizer_config": {"eos_token": "<|im_end|>", "pad_token": TYPED}},
    "named words of a model's own": {
        "tokenizer_config": {"image_token": "<image>", "eos_token": "</s>", "add_bos_token": True}
    },
    "extra words": {"tokenizer_config": {"additional_special_tokens": ["<extra>", TYPED], "unk_token": "<unk>"}},
    "extra words by name": {"tokenizer_config": {"extra_special_tokens": {"image_token": "<image>"}}},
    "gap": {"tokenizer_config": {"added_tokens_decoder": {"270": token("<tool>")}}},
}


def checkpoint(folder: Path, **files: dict[str, Any]) -> Path:
    """A LLaMA directory without tensors whose vocabulary has 260 tokens and whose embedding has 300 rows."""
    write_small_files(folder, LLAMA_CONFIG)
    write_weights(folder / "model.safetensors", {})
    write_json(folder / "tokenizer_config.json", FAST)
    for name, content in files.items():
        write_json(folder / f"{name}.json", FAST | content if name == "tokenizer_config" else content)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_ids_equal_those_of_transformers(tmp_path: Path, name: str) -> None:
    folder = checkpoint(tmp_path, **CASES[name])
    expected = AutoTokenizer.from_pretrained(folder)
    opened = open_checkpoint(folder)
    tokenizer = Tokenizer.from_str(opened.tokenizer_json)
    for text in (*WORDS, "".join(WORDS), " x ".join(WORDS)):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == expected.encode(text, add_special_tokens=False), text
        assert tokenizer.decode(ids, skip_special_tokens=False) == expected.decode(ids)
    if expected.eos_token_id is not None:
        assert expected.eos_token_id in opened.special["eos_token_ids"]


def test_files_that_add_nothing_change_nothing(tmp_path: Path) -> None:
    plain = open_checkpoint(checkpoint(tmp_path / "plain"))
    same = {"tokenizer_config": {"added_tokens_decoder": {"2": token("</s>")}, "eos_token": "</s>"}, "added_tokens": {"<s>": 1}}
    opened = open_checkpoint(checkpoint(tmp_path / "same", **same))
    assert opened.tokenizer_json == plain.tokenizer_json and "added_tokens.json" not in opened.digests()


def test_added_tokens_json_is_digested_where_it_adds_tokens(tmp_path: Path) -> None:
    assert "added_tokens.json" in open_checkpoint(checkpoint(tmp_path, added_tokens={"<tool>": 260})).digests()


def test_tokens_without_a_row_of_the_embedding_are_left_out(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, tokenizer_config={"pad_token": "[PAD]", "eos_token": "<tool>"})
    write_json(folder / "config.json", LLAMA_CONFIG | {"vocab_size": 261})
    opened = open_checkpoint(folder)
    assert Tokenizer.from_str(opened.tokenizer_json).get_vocab_size() == 261
    assert opened.notes[0] == "'[PAD]': not in the tokenizer, and the embedding of 261 rows has none for them; left out"


def test_ids_that_differ_from_the_stated_ones_are_noted(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, **CASES["gap"])
    note = "ids of tokenizer.json, as in Transformers, and not of tokenizer_config.json: '<tool>' is 260, not 270"
    assert open_checkpoint(folder).notes == (note,)


@pytest.mark.parametrize("decoder", [[1], {"x": token("a")}, {"260": {"special": True}}, {"260": None}], ids=repr)
def test_decoders_that_cannot_be_read(tmp_path: Path, decoder: object) -> None:
    folder = checkpoint(tmp_path, tokenizer_config={"added_tokens_decoder": decoder})
    with pytest.raises(CompileError, match=r"added tokens of .*tokenizer_config\.json: found tokens that cannot be read"):
        open_checkpoint(folder)
