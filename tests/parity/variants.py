"""Tiny random checkpoints of every shape the families build, made on the spot by Transformers; and what it answers.

Tests take a variant by name and a directory:

    directory = VARIANTS["llama_gqa"](tmp_path)
    expected = hf_logits(directory, ids)                   # float32 [len(ids), vocab_size]
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils import logging as hf_logging

torch.set_num_threads(1)
hf_logging.set_verbosity_error()
hf_logging.disable_progress_bar()

Floats = npt.NDArray[np.float32]
Maker = Callable[[Path], Path]

SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
WORDS = ("the", "and", "ing", "你好", "世界", "helo")
ALPHABET = "abcdefghijklmnopqrstuvwxyz,.你好世界"

# Sizes are awkward on purpose: vocabularies and most widths are no multiples of 16. Tokenizers have 260 to 300 tokens.
_BLOOM: dict[str, Any] = {"vocab_size": 307, "hidden_size": 64, "n_layer": 2, "n_head": 4, "layer_norm_epsilon": 1e-5}
_LLAMA: dict[str, Any] = {
    "vocab_size": 311, "hidden_size": 64, "intermediate_size": 104, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 32}  # fmt: skip
# Prompts of the tests are longer than the 8 tokens before scaling; with these betas, heads of 16 have interpolated pairs.
_YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 16.0, "original_max_position_embeddings": 8, "beta_fast": 8.0,
         "beta_slow": 0.2}  # fmt: skip

BLOOMS: Mapping[str, dict[str, Any]] = {
    "bloom": {},
    "bloom_3_heads": {"hidden_size": 72, "n_head": 3, "vocab_size": 305},
    "bloom_6_heads": {"hidden_size": 48, "n_head": 6, "n_layer": 3, "layer_norm_epsilon": 1e-3},
    "bloom_residual_after_norm": {"hidden_size": 40, "n_head": 5, "apply_residual_connection_post_layernorm": True},
    "bloom_untied": {"hidden_size": 96, "n_head": 3, "tie_word_embeddings": False},
}
LLAMAS: Mapping[str, dict[str, Any]] = {
    "llama": {},
    "llama_gqa": {"hidden_size": 72, "num_attention_heads": 6, "num_key_value_heads": 2, "num_hidden_layers": 3},
    "llama_tied": {"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "llama_head_dim": {"hidden_size": 36, "head_dim": 32, "num_key_value_heads": 2, "rms_norm_eps": 1e-5},
    "llama_biases": {"attention_bias": True, "mlp_bias": True, "intermediate_size": 90},
    "llama_theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "num_key_value_heads": 2},
    "llama_linear_rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    # Prompts of the tests are longer than 16 tokens, so the base grows.
    "llama_dynamic_rope": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 8.0},
        "max_position_embeddings": 16,
    },
    "llama3_rope": {"rope_parameters": _LLAMA3, "num_key_value_heads": 2},
    "llama_yarn": {"rope_parameters": _YARN, "num_key_value_heads": 2},
}
# Families whose config has LLaMA's keys, by the classes in Transformers.
RELATIVES: Mapping[tuple[Any, Any], dict[str, dict[str, Any]]] = {
    (Qwen2ForCausalLM, Qwen2Config): {
        "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": True},
        # Prompts of the tests are longer than the window of the last two layers.
        "qwen2_window": {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    },
    (MistralForCausalLM, MistralConfig): {
        "mistral": {"sliding_window": 9, "head_dim": 24, "num_key_value_heads": 1},
    },
    (Qwen3ForCausalLM, Qwen3Config): {
        "qwen3": {
            "head_dim": 24,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 11,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    },
}

_SCALES = {"query_key_value.weight": 2.0, "attention.dense.weight": 6.0, "o_proj.weight": 4.0}


def make_bloom(directory: Path, *, name: str = "bloom", **changes: Any) -> Path:
    """A random BLOOM with a byte-level tokenizer, as save_pretrained writes it; `changes` are config values."""
    config = BloomConfig(**{**_BLOOM, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, **changes})
    _save(BloomForCausalLM(config), name, directory)
    return _save_tokenizer(_byte_level(), directory)


def make_llama(directory: Path, *, name: str = "llama", **changes: Any) -> Path:
    """A random LLaMA with a byte-fallback tokenizer, as save_pretrained writes it; `changes` are config values."""
    return make_relative(LlamaForCausalLM, LlamaConfig, directory, name=name, **changes)


def make_relative(model: Any, config: Any, directory: Path, *, name: str, **changes: Any) -> Path:
    """As `make_llama`, of the classes in Transformers of a family whose config has LLaMA's keys."""
    values = {**_LLAMA, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, **changes}
    _save(model(config(**values)), name, directory)
    return _save_tokenizer(_byte_fallback(), directory)


REFERENCE = "reference"  # folder in a checkpoint that Transformers has no class for: the same model in a class that it has


def make_internlm2(directory: Path, *, name: str = "internlm2", **changes: Any) -> Path:
    """A random InternLM2 beside the LLaMA that it is: other names, and q, k and v of each key/value head in one tensor."""
    make_llama(directory, name=name, **changes)
    reference, config = _as_reference(directory)
    heads, kv_heads, head_dim = (config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    tensors = load_file(reference / "model.safetensors")
    for prefix in [key.removesuffix("q_proj.weight") for key in tensors if key.endswith("q_proj.weight")]:
        for kind in ("weight", "bias"):
            if f"{prefix}q_proj.{kind}" in tensors:
                q, k, v = (tensors.pop(f"{prefix}{part}_proj.{kind}") for part in "qkv")
                grouped = [
                    part.reshape(kv_heads, count, head_dim, -1) for part, count in ((q, heads // kv_heads), (k, 1), (v, 1))
                ]
                packed = np.concatenate(grouped, axis=1)
                tensors[f"{prefix}wqkv.{kind}"] = packed.reshape(-1, *q.shape[1:])
    for name, new in _INTERNLM2.items():
        tensors = {key.replace(name, new): tensor for key, tensor in tensors.items()}
    save_file(tensors, directory / "model.safetensors")
    kept = {key: value for key, value in config.items() if key not in ("attention_bias", "mlp_bias", "architectures")}
    kept |= {"model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"], "bias": config["attention_bias"]}
    (directory / "config.json").write_text(json.dumps(kept))
    return directory


def make_minicpm(directory: Path, *, name: str = "minicpm", scale_emb: float, scale_depth: float, dim_model_base: int,
                 **changes: Any) -> Path:  # fmt: skip
    """A random MiniCPM beside the Granite that it is."""
    sizes = {**_LLAMA, **changes}
    factors = {
        "embedding_multiplier": scale_emb,
        "residual_multiplier": scale_depth / sizes["num_hidden_layers"] ** 0.5,
        "logits_scaling": sizes["hidden_size"] / dim_model_base,
        "attention_multiplier": (sizes["hidden_size"] // sizes["num_attention_heads"]) ** -0.5,
    }
    make_relative(GraniteForCausalLM, GraniteConfig, directory, name=name, **changes, **factors)
    reference, config = _as_reference(directory)
    shutil.copy(reference / "model.safetensors", directory)
    kept = {key: value for key, value in config.items() if key not in (*factors, "mlp_bias", "architectures")}
    kept |= {"model_type": "minicpm", "architectures": ["MiniCPMForCausalLM"]}
    kept |= {"scale_emb": scale_emb, "scale_depth": scale_depth, "dim_model_base": dim_model_base}
    (directory / "config.json").write_text(json.dumps(kept))
    return directory


def _as_reference(directory: Path) -> tuple[Path, dict[str, Any]]:
    """Move a model to the folder of the reference, without its tokenizer; returns the folder, and the model's config.json."""
    reference = directory / REFERENCE
    reference.mkdir()
    for file in ("model.safetensors", "config.json", "generation_config.json"):
        (directory / file).rename(reference / file)
    return reference, json.loads((reference / "config.json").read_text())


_INTERNLM2 = {
    "embed_tokens": "tok_embeddings", "lm_head": "output", "self_attn.o_proj": "attention.wo", "self_attn": "attention",
    "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3",
}  # fmt: skip


# Name -> function that makes the checkpoint in a directory and returns that directory.
VARIANTS: Mapping[str, Maker] = {
    **{name: partial(make_bloom, name=name, **changes) for name, changes in BLOOMS.items()},
    **{name: partial(make_llama, name=name, **changes) for name, changes in LLAMAS.items()},
    **{
        name: partial(make_relative, *classes, name=name, **changes)
        for classes, variants in RELATIVES.items()
        for name, changes in variants.items()
    },
    "internlm2": partial(make_internlm2, num_key_value_heads=2, attention_bias=True),
    "minicpm": partial(make_minicpm, scale_emb=12, scale_depth=1.4, dim_model_base=16, tie_word_embeddings=True),
}


def hf_logits(directory: Path, ids: Sequence[int]) -> Floats:
    """What Transformers computes for one prompt in one go: float32 [len(ids), vocab_size]."""
    return hf_step_logits(directory, [ids])


def hf_step_logits(directory: Path, steps: Sequence[Sequence[int]]) -> Floats:
    """What it computes when it is given the tokens in several calls with its cache: float32 [all tokens, vocab_size].

    Only with dynamic RoPE do the steps matter.
    """
    model = load_hf(directory)  # fresh each time: a model with dynamic RoPE remembers the longest sequence it saw
    past, logits = None, []
    with torch.inference_mode():
        for step in steps:
            output = model(torch.tensor([list(step)]), past_key_values=past, use_cache=True)
            past = output.past_key_values
            logits.append(output.logits[0].numpy())
    return np.concatenate(logits).astype(np.float32)


def hf_greedy(directory: Path, ids: Sequence[int], n: int) -> list[int]:
    """The n tokens Transformers finds likeliest one after the other, its cache in use; EOS does not stop it."""
    model, past, step, found = load_hf(directory), None, list(ids), []
    with torch.inference_mode():
        for _ in range(n):
            output = model(torch.tensor([step]), past_key_values=past, use_cache=True)
            past = output.past_key_values
            step = [int(output.logits[0, -1].argmax())]
            found += step
    return found


def load_hf(directory: Path) -> Any:
    """The model in float32, for inference."""
    reference = directory / REFERENCE
    path = reference if reference.is_dir() else directory
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


def random_ids(directory: Path, count: int, seed: int = 0) -> list[int]:
    """Token ids from the whole vocabulary of the model in `directory`."""
    vocab_size = json.loads((directory / "config.json").read_text())["vocab_size"]
    return [int(token) for token in np.random.default_rng(seed).integers(0, vocab_size, count)]


def _save(model: Any, name: str, directory: Path) -> None:
    """Random weights under which nothing is near its neutral value: no norm 1, no bias 0, attention far from uniform."""
    # With this 22, greedy decoding of no variant gets stuck at a few tokens, which would prove little.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name}22".encode()))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in key or ".ln_f." in key:
                parameter.copy_(0.2 * noise + (1.0 if key.endswith("weight") else 0.0))
            elif key.endswith("bias"):
                parameter.copy_(0.3 * noise)
            else:  # what attention finds outweighs the token itself, or greedy decoding would repeat one token
                scale = next((scale for end, scale in _SCALES.items() if key.endswith(end)), 1.5)
                parameter.copy_(noise * scale / parameter.shape[1] ** 0.5)
    model.save_pretrained(directory)


def _byte_level() -> Tokenizer:
    """BPE over bytes with a few merges, as BLOOM's."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL.values(), *alphabet])}
    coded = [pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(word)[0][0] for word in WORDS]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=_merges(coded, vocabulary)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _byte_fallback() -> Tokenizer:
    """SentencePiece-like BPE over characters that falls back to bytes, as LLaMA's."""
    tokens = [*SPECIAL.values(), *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *ALPHABET]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = _merges(WORDS, vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def _merges(words: Sequence[str], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Merges that build each word from the left; their results are added to the vocabulary."""
    merges: list[tuple[str, str]] = []
    for word in words:
        for end in range(1, len(word)):
            if word[: end + 1] not in vocabulary:
                vocabulary[word[: end + 1]] = len(vocabulary)
                merges.append((word[:end], word[end]))
    return merges


def _save_tokenizer(tokenizer: Tokenizer, directory: Path) -> Path:
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL.values()])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {**SPECIAL, "tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False}
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    return directory
