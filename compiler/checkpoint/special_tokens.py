"""Special tokens of a checkpoint, from the four files that may state them."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer


def special_tokens(
    config: dict[str, Any],
    generation: dict[str, Any],
    tokenizer_config: dict[str, Any],
    tokens_map: dict[str, Any],
    tokenizer_json: str,
    *,
    raw_template: bool,
) -> dict[str, Any]:
    """Return bos_token_id, eos_token_ids, pad_token_id, bos_token, eos_token, add_bos and add_bos_raw; see `Checkpoint`.

    Tokens that the tokenizer's files name outrank ids in the configs: LLaMA conversions of early 2023 state bos 0 and eos 1 in
    config.json although their tokenizer has <s> = 1 and </s> = 2. The EOS tokens are those of generation_config.json (else
    config.json) together with the tokenizer's. Ids outside of the vocabulary, such as pad -1, count as absent.
    """
    tokenizer = Tokenizer.from_str(tokenizer_json)
    vocab_size = config.get("vocab_size", tokenizer.get_vocab_size())

    def by_word(kind: str) -> int | None:
        word = _word(tokenizer_config.get(kind)) or _word(tokens_map.get(kind))
        index = tokenizer.token_to_id(word) if word else None
        return index if index is not None and index < vocab_size else None

    def by_number(kind: str) -> list[int]:
        stated = next((value for source in (generation, config) if (value := source.get(kind)) is not None), None)
        values = stated if isinstance(stated, list) else [stated]
        return [v for v in values if type(v) is int and 0 <= v < vocab_size and tokenizer.id_to_token(v) is not None]

    bos = _first([by_word("bos_token"), *by_number("bos_token_id")])
    pad = _first([by_word("pad_token"), *by_number("pad_token_id")])
    eos_word, eos_numbers = by_word("eos_token"), by_number("eos_token_id")
    if eos_word is not None and bos is not None and bos != eos_word:
        eos_numbers = [v for v in eos_numbers if v != bos]
    eos = list(dict.fromkeys([*eos_numbers, *([eos_word] if eos_word is not None else [])]))
    add_bos_raw = bos is not None and _adds_bos(tokenizer_config, tokenizer_json)
    first_eos = eos_word if eos_word is not None else _first([*eos])
    return {
        "bos_token_id": bos,
        "eos_token_ids": eos,
        "pad_token_id": pad,
        "bos_token": (tokenizer.id_to_token(bos) or "") if bos is not None else "",
        "eos_token": (tokenizer.id_to_token(first_eos) or "") if first_eos is not None else "",
        # A chat template contains BOS if its model needs one, and BELLE's models were trained without BOS.
        "add_bos": add_bos_raw and raw_template,
        "add_bos_raw": add_bos_raw,
    }


def _word(token: Any) -> str:
    """The text of a token that a file states as a string or as {"content": string, ...}; empty if it states none."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def _first(values: list[int | None]) -> int | None:
    return next((value for value in values if value is not None), None)


def _adds_bos(tokenizer_config: dict[str, Any], tokenizer_json: str) -> bool:
    stated = tokenizer_config.get("add_bos_token")
    if isinstance(stated, bool):
        return stated
    processor = json.loads(tokenizer_json).get("post_processor")
    if processor is None:
        return False
    steps = processor.get("processors", [processor])
    return any("SpecialToken" in step.get("single", [{}])[0] for step in steps if step.get("type") == "TemplateProcessing")
