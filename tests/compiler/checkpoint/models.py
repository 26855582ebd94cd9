"""Tiny checkpoints for the tests, made on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

VOCAB, HIDDEN, HEADS, KV_HEADS, FFN = 300, 32, 4, 2, 48
HEAD_DIM = HIDDEN // HEADS

LLAMA_CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCAB,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BLOOM_CONFIG: dict[str, Any] = {
    "model_type": "bloom",
    "architectures": ["BloomForCausalLM"],
    "hidden_size": HIDDEN,
    "n_layer": 1,
    "n_head": HEADS,
    "vocab_size": VOCAB,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}


def llama_tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    kv = KV_HEADS * HEAD_DIM
    layer = {
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (kv, HIDDEN),
        "self_attn.v_proj": (kv, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (FFN, HIDDEN),
        "mlp.up_proj": (FFN, HIDDEN),
        "mlp.down_proj": (HIDDEN, FFN),
    }
    shapes = {
        "model.embed_tokens": (VOCAB, HIDDEN),
        "model.norm": (HIDDEN,),
        "lm_head": (VOCAB, HIDDEN),
        **{f"model.layers.0.{name}": shape for name, shape in layer.items()},
    }
    return {f"{name}.weight": torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def bloom_tensors(prefix: str = "", dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {
        "word_embeddings.weight": (VOCAB, HIDDEN),
        "ln_f.weight": (HIDDEN,),
        "ln_f.bias": (HIDDEN,),
        "h.0.self_attention.query_key_value.weight": (3 * HIDDEN, HIDDEN),
    }
    return {prefix + name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def byte_tokenizer() -> Tokenizer:
    """Byte-level, no merges: <unk> 0, <s> 1, </s> 2, <pad> 3, then the 256 bytes."""
    words = ["<unk>", "<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in words[:4]])
    return tokenizer


class Attack:
    """Creates a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def write_json(file: Path, value: object) -> None:
    file.write_text(json.dumps(value), encoding="utf-8")


def write_small_files(directory: Path, config: dict[str, Any]) -> Path:
    """config.json and tokenizer.json."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", config)
    byte_tokenizer().save(str(directory / "tokenizer.json"))
    return directory


def write_sharded(directory: Path, tensors: dict[str, torch.Tensor], suffix: str) -> None:
    """Two shards and their index."""
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"{stem}-{number:05d}-of-00002.{suffix}"
        write_weights(directory / file, {name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    write_json(directory / f"{stem}.{suffix}.index.json", {"metadata": {}, "weight_map": weight_map})


def write_weights(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, file) if file.suffix == ".safetensors" else torch.save(tensors, file)


def write_llama(directory: Path, **config: Any) -> Path:
    """A complete LLaMA directory with model.safetensors."""
    write_small_files(directory, LLAMA_CONFIG | config)
    write_weights(directory / "model.safetensors", llama_tensors())
    return directory
