"""Tiny checkpoints that combine what others test alone, beside Transformers: special tokens, ids, rendered chats, defaults."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from belle_compile.compiler.checkpoint import Checkpoint, open_checkpoint
from belle_compile.compiler.checkpoint.templates import render
from tests.compiler.checkpoint.models import LLAMA_CONFIG, write_json, write_small_files, write_weights


def token(content: str, *, special: bool = True, rstrip: bool = False) -> dict[str, Any]:
    fixed = {"lstrip": False, "normalized": False, "single_word": False}
    return {"content": content, "special": special, "rstrip": rstrip, **fixed}


TURNS = {"260": token("<|im_start|>"), "261": token("<|im_end|>")}
CHOICES: dict[str, list[dict[str, Any] | None]] = {
    "tokenizer_config": [
        {},
        {"bos_token": "<s>", "eos_token": "</s>"},
        {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<pad>"},
        {"eos_token": "<|im_end|>", "added_tokens_decoder": TURNS},
        {"bos_token": "<s>", "eos_token": {"__type": "AddedToken", **token("</s>")}, "additional_special_tokens": ["<tool>"]},
        {"added_tokens_decoder": {"260": token("<a>", special=False, rstrip=True)}, "eos_token": "<pad>"},
    ],
    "special_tokens_map": [
        None,
        {},
        {"eos_token": "<pad>", "pad_token": "<pad>"},
        {"bos_token": token("<s>"), "eos_token": token("</s>")},
    ],
    "added_tokens": [None, {"<|im_start|>": 260, "<|im_end|>": 261}],
    "generation_config": [
        None,
        {},
        {"eos_token_id": [2, 3], "do_sample": True, "temperature": 0.7},
        {"eos_token_id": 2, "temperature": 0.3},
        {"bos_token_id": 1, "eos_token_id": 2, "_from_model_config": True, "repetition_penalty": 1.1},
    ],
    "config": [{}, {"eos_token_id": 3}, {"eos_token_id": [2, 3]}, {"do_sample": True, "top_p": 0.5}],
}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{{ bos_token }}{% if tools is none %}no tools{% endif %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
TEXTS = ("a<|im_end|>b</s><s> <tool><pad><a> x <|im_start|>", "plain", " <a>  y")
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "</s>"}]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**LLAMA_CONFIG))


def generation_of(folder: Path, model: LlamaForCausalLM) -> GenerationConfig:
    """The settings that `generate` would use, which `from_pretrained` reads from either file."""
    try:
        model.generation_config = GenerationConfig.from_pretrained(folder)
    except OSError:
        model.generation_config = GenerationConfig.from_pretrained(
            folder, config_file_name="config.json", _from_model_config=True
        )
    prepared: GenerationConfig = model._prepare_generation_config(None)[0]  # type: ignore[operator]
    return prepared


def check_special_tokens(checkpoint: Checkpoint, tokenizer: Any, generation: GenerationConfig) -> None:
    special, stated = checkpoint.special, generation.eos_token_id
    ends = [stated] if isinstance(stated, int) else stated or []
    assert {*ends, *([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])} <= set(special["eos_token_ids"])
    for kind in ("bos", "pad"):
        if (index := getattr(tokenizer, f"{kind}_token_id")) is not None:
            assert special[f"{kind}_token_id"] == index


@pytest.mark.parametrize("seed", range(60))
def test_as_transformers(tmp_path: Path, model: LlamaForCausalLM, seed: int) -> None:
    chosen = {name: random.Random(f"{seed} {name}").choice(choices) for name, choices in CHOICES.items()}
    write_small_files(tmp_path, LLAMA_CONFIG | (chosen.pop("config") or {}))
    write_weights(tmp_path / "model.safetensors", {})
    fast = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    for name, content in {**chosen, "tokenizer_config": fast | (chosen["tokenizer_config"] or {})}.items():
        if content is not None:
            write_json(tmp_path / f"{name}.json", content)

    checkpoint, tokenizer = open_checkpoint(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    generation = generation_of(tmp_path, model)
    check_special_tokens(checkpoint, tokenizer, generation)
    own = Tokenizer.from_str(checkpoint.tokenizer_json)
    for text in TEXTS:
        assert own.encode(text, add_special_tokens=False).ids == tokenizer.encode(text, add_special_tokens=False), text
    words = {name: checkpoint.special[name] for name in ("bos_token", "eos_token")}
    expected = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert render(checkpoint.template, MESSAGES, **words) == expected
    sampled = {key: getattr(generation, key) for key in ("temperature", "top_k", "top_p")}
    sampled = sampled if generation.do_sample else {"temperature": 0, "top_k": 0, "top_p": 1}
    wanted = sampled | {"repetition_penalty": generation.repetition_penalty}
    assert {key: checkpoint.generation[key] for key in wanted} == wanted
