"""A tokenizer.json, special tokens, prompt template and sampling settings as the metadata that llama.cpp reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import tokenizers

from belle_compile.compiler.checkpoint.formats.gguf_rules import SENTENCEPIECE
from belle_compile.compiler.checkpoint.formats.gguf_tokenizer import (
    BLOOM_SPLIT,
    LLAMA3_SPLIT,
    QWEN2_SPLIT,
    TEKKEN_SPLIT,
    gguf_tokenizer,
)
from belle_compile.compiler.checkpoint.sentencepiece_model import (
    BYTE,
    CONTROL,
    NORMAL,
    SAMPLES,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
)
from belle_compile.compiler.checkpoint.templates import RAW
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.exports.directory import STAGE
from belle_compile.compiler.exports.model import ExportedModel
from belle_compile.runtime.sentencepiece_rule import RANKS_KEY, load

BYTE_LEVEL = "gpt2"  # tokenizer.ggml.model of byte-level BPE, whatever the architecture
# tokenizer.ggml.pre by the steps of a tokenizer.json's pre-tokenizer.
_PRE: Mapping[tuple[str, ...], str] = {
    ("bytes of words",): "gpt-2",
    ("digits", "bytes of words"): "smollm",
    (BLOOM_SPLIT, "bytes"): "bloom",
    (LLAMA3_SPLIT, "bytes"): "llama-bpe",
    (QWEN2_SPLIT, "bytes"): "qwen2",
    (TEKKEN_SPLIT, "bytes"): "tekken",
}
# Names of generation settings in the metadata, and the methods of the writer that add them.
_SAMPLING = {
    "temperature": "add_sampling_temp",
    "top_k": "add_sampling_top_k",
    "top_p": "add_sampling_top_p",
    "min_p": "add_sampling_min_p",
    "repetition_penalty": "add_sampling_penalty_repeat",
}
# The method of a writer that adds a value, by the value's type in Python.
_ADDERS: Mapping[type, Any] = {
    str: attrgetter("add_string"),
    list: attrgetter("add_array"),
    bool: attrgetter("add_bool"),
    int: attrgetter("add_uint32"),
    float: attrgetter("add_float32"),
}


@dataclass(frozen=True)
class Vocabulary:
    """The tokens in the order of their ids, one for each row of the embedding, with their types and, for sentencepiece, their
    scores (else None) or their merges and the rule that splits texts."""

    model: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None
    space_prefix: bool = False
    merges: tuple[str, ...] = ()
    pre: str = "default"


def vocabulary_of(model: ExportedModel) -> Vocabulary:
    """The vocabulary of a model; raises CompileError for a tokenizer that llama.cpp has no rules for."""
    plain = json.loads(model.tokenizer_json)
    rows = model.dimensions.vocab_size
    return _sentencepiece(plain, rows) if _is_sentencepiece(plain) else _byte_level(plain, rows)


def add_vocabulary(writer: Any, model: ExportedModel) -> list[str]:
    """Add all metadata on tokens to a writer; returns a note on a text that llama.cpp would encode otherwise."""
    plain, made = json.loads(model.tokenizer_json), vocabulary_of(model)
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": made.model,
        "tokenizer.ggml.pre": made.pre,
        "tokenizer.ggml.tokens": made.tokens,
        "tokenizer.ggml.token_type": made.types,
        "tokenizer.ggml.add_bos_token": _adds_bos(model),
        **_special_ids(model, plain),
    }
    if made.scores is not None:
        metadata |= {"tokenizer.ggml.scores": made.scores, "tokenizer.ggml.add_space_prefix": made.space_prefix}
    else:
        metadata["tokenizer.ggml.merges"] = list(made.merges)
    for key, value in metadata.items():
        add_value(writer, key, value)
    writer.add_chat_template(model.template.jinja)
    if model.generation.temperature > 0:
        for name, method in _SAMPLING.items():
            getattr(writer, method)(getattr(model.generation, name))
    return _differences(model, metadata)


def add_value(writer: Any, key: str, value: Any) -> None:
    """Add a value to the metadata in llama.cpp's type for it; whole numbers are unsigned there."""
    _ADDERS[type(value)](writer)(key, value)


def _is_sentencepiece(plain: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json is a converted sentencepiece model: its pieces have spaces as ▁ and fall back to bytes."""
    return bool(plain["model"].get("byte_fallback")) and plain["model"]["type"] == "BPE"


def _sentencepiece(plain: Mapping[str, Any], rows: int) -> Vocabulary:
    """Scores that merge in the order of the merges: the better, the earlier the first merge that makes a piece."""
    tokens, types = _tokens(plain, rows)
    vocabulary: Mapping[str, int] = plain["model"]["vocab"]
    ranks: dict[int, int] = {}
    if (stated := plain["model"].get(RANKS_KEY)) is not None:
        ranks = {index: rank for index, rank in enumerate(stated) if rank is not None}
    else:
        for rank, merge in enumerate(_pairs(plain)):
            ranks.setdefault(vocabulary["".join(merge)], rank)
    worst = -float(max(ranks.values(), default=0) + 1)
    scores = [-float(ranks[index]) if index in ranks else worst for index in range(rows)]
    scores = [score if kind == NORMAL else 0.0 for score, kind in zip(scores, types, strict=True)]
    types = [BYTE if kind == NORMAL and _is_byte(token) else kind for token, kind in zip(tokens, types, strict=True)]
    return Vocabulary(SENTENCEPIECE, tokens, types, scores=scores, space_prefix=_prepends_space(plain))


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _prepends_space(plain: Mapping[str, Any]) -> bool:
    steps = _flat(plain.get("normalizer"), "normalizers") + _flat(plain.get("pre_tokenizer"), "pretokenizers")
    return any(
        (step["type"] == "Prepend" and step["prepend"] == SPACE)
        or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in steps
    )


def _byte_level(plain: Mapping[str, Any], rows: int) -> Vocabulary:
    tokens, types = _tokens(plain, rows)
    steps = tuple(_step(step) for step in _flat(plain.get("pre_tokenizer"), "pretokenizers"))
    if plain["model"]["type"] != "BPE" or steps not in _PRE:
        raise CompileError(
            STAGE, "tokenizer", found=f"{plain['model']['type']} of texts that are split by {', '.join(steps) or 'no rule'}",
            expected="a rule that llama.cpp has: those of GPT-2, SmolLM, BLOOM, Llama 3, Qwen2 and Tekken, or sentencepiece",
            remedy="use another --format",
        )  # fmt: skip
    merges = tuple(" ".join(merge) for merge in _pairs(plain))
    if not merges:
        expected = "some, since llama.cpp loads no vocabulary of bytes without"
        raise CompileError(STAGE, "merges of the tokenizer", found="none", expected=expected, remedy="use another --format")
    return Vocabulary(BYTE_LEVEL, tokens, types, merges=merges, pre=_PRE[steps])


def _flat(step: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """A step of a tokenizer.json as the list of the steps that it consists of."""
    if step is None:
        return []
    return [inner for each in step[key] for inner in _flat(each, key)] if step["type"] == "Sequence" else [step]


def _step(step: Mapping[str, Any]) -> str:
    """The name of a step in the keys of `_PRE`; its type where there is none."""
    if step["type"] == "ByteLevel" and not step.get("add_prefix_space"):
        return "bytes of words" if step.get("use_regex", True) else "bytes"
    if step["type"] == "Digits" and step.get("individual_digits"):
        return "digits"
    if step["type"] == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return str(step["pattern"].get("Regex", step["type"]))
    return str(step["type"])


def _pairs(plain: Mapping[str, Any]) -> list[tuple[str, str]]:
    merges = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in plain["model"]["merges"])
    return [(left, right) for left, right in merges]


def _tokens(plain: Mapping[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """The tokens and types of all rows of the embedding; rows without a token get an unused one, as llama.cpp's converter
    gives them, and tokens without a row are left out."""
    tokens, types = [f"[PAD{index}]" for index in range(rows)], [UNUSED] * rows
    for token, index in plain["model"]["vocab"].items():
        if index < rows:
            tokens[index], types[index] = token, NORMAL
    for entry in plain["added_tokens"]:
        if (index := entry["id"]) < rows:
            tokens[index], types[index] = entry["content"], CONTROL if entry["special"] else USER_DEFINED
    if (unknown := plain["model"]["vocab"].get(plain["model"].get("unk_token"))) is not None and unknown < rows:
        types[unknown] = UNKNOWN
    return tokens, types


def _adds_bos(model: ExportedModel) -> bool:
    """Whether llama.cpp puts BOS before prompts. It does so before chats too, which this tokenizer may not: BELLE's models were
    trained without BOS. A template that writes BOS itself does not get a second one."""
    return bool(model.special["add_bos_raw"]) and (model.template.name == RAW or "bos_token" in model.template.jinja)


def _special_ids(model: ExportedModel, plain: Mapping[str, Any]) -> dict[str, int]:
    special, ends = model.special, list(model.special["eos_token_ids"])
    word = (
        tokenizers.Tokenizer.from_str(model.tokenizer_json).token_to_id(special["eos_token"]) if special["eos_token"] else None
    )
    ends = list(dict.fromkeys([*([word] if word in ends else []), *ends]))
    unknown = plain["model"]["vocab"].get(plain["model"].get("unk_token"))
    ids = {"bos": special["bos_token_id"], "unknown": unknown, "padding": special["pad_token_id"]}
    ids |= dict(zip(("eos", "eot", "eom"), ends, strict=False))
    return {f"tokenizer.ggml.{kind}_token_id": int(index) for kind, index in ids.items() if index is not None}


def _differences(model: ExportedModel, metadata: Mapping[str, Any]) -> list[str]:
    """A note on the first text that llama.cpp's rules encode otherwise than the model's tokenizer."""
    ours = load(model.tokenizer_json)
    theirs = load(gguf_tokenizer(Path(model.name), lambda key, default=None: metadata.get(key, default)))
    for sample in SAMPLES:
        if ours.encode(sample, add_special_tokens=False).ids != theirs.encode(sample, add_special_tokens=False).ids:
            return [f"llama.cpp's rules encode texts such as {sample!r} otherwise than the model's tokenizer"]
    return []
