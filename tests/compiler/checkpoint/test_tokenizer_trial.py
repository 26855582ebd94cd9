"""Tokenizers whose expressions take more than linear time, or whose replacements multiply a text, are refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from belle_compile.compiler.checkpoint.tokenizer_trial import reason_against
from belle_compile.compiler.checkpoint.tokenizers import check_tokenizer
from belle_compile.compiler.errors import CompileError

# The expressions of public tokenizers.
PUBLIC = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "bloom": r" ?[^(\s|[.,!?…。，、।۔،])]+",
    "llama-3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    "qwen-2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "o200k": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "deepseek": r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "spaces": r" {2,}",
}
_FAILS, _SLOW = "Onig: Regex search error: retry-limit", "s of processor time for"


def split(pattern: str) -> dict[str, Any]:
    part = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [part, byte_level]}}


def replace(*changes: tuple[str, str], kind: str = "String", part: str = "normalizer") -> dict[str, Any]:
    each = [{"type": "Replace", "pattern": {kind: old}, "content": new} for old, new in changes]
    return {part: {"type": "Sequence", "normalizers" if part == "normalizer" else "decoders": each}}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_tokenizers_pass(name: str) -> None:
    assert reason_against(split(PUBLIC[name])) == ""


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"normalizer": {"type": "NFKC"}, "decoder": {"type": "ByteLevel"}},
        replace((" ", "▁")),
        replace(("▁", " "), part="decoder"),
        {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0], ["aa", -1.5]]}},
    ],
)
def test_parts_without_expressions_pass(parts: dict[str, Any]) -> None:
    assert reason_against(parts) == ""


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        (split(r"(a+)+$"), _FAILS),
        (split(r"(.*)*x"), _FAILS),
        (split(r"(\w+\s?)*$"), _FAILS),
        (split(r"(a|b|ab)*c"), _FAILS),
        (replace((r"(z+)+y", ""), kind="Regex"), _FAILS),
        (replace((r"(q*)*p", ""), kind="Regex", part="decoder"), _FAILS),
        (split(r"\d{1,3}(?=(?:\d{3})*\b)"), _SLOW),  # quadratic
        (split(r"x*x*y"), _SLOW),  # cubic
        (replace(("a", "b" * 10_000)), "its normalizer makes"),
        (replace((".", "xy" * 100), kind="Regex"), "its normalizer makes"),
        (replace(("", "abc" * 40), kind="Regex"), "its normalizer makes"),
        (replace(*((chr(97 + i), chr(98 + i) * 4) for i in range(24))), ""),  # 4**24 characters: out of time or memory
        (replace(*[("a", "aa")] * 40), ""),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, None),
    ],
)
def test_hostile_tokenizers(parts: dict[str, Any], reason: str | None) -> None:
    found = reason_against(parts)
    assert found == "" if reason is None else found.startswith("it") and reason in found, found


def test_a_hostile_tokenizer_is_one_sentence() -> None:
    model = {"type": "BPE", "vocab": {"a": 0}, "merges": []}
    tokenizer = {"version": "1.0", "added_tokens": [], "normalizer": None, "decoder": None, "model": model, **split(r"(a+)+$")}
    with pytest.raises(
        CompileError, match=r"^checkpoint: tokenizer t\.json: found that it fails for .*, expected one whose time"
    ):
        check_tokenizer(json.dumps(tokenizer), "t.json")
