"""Makes checkpoints of real dimensions with random weights, one shard in memory at a time: for speed, not for answers.

Run it with a shape's name and a directory:

    python -m benchmarks.checkpoints llama-1b build/checkpoints/llama-1b
"""

from __future__ import annotations

import argparse
import json
import shutil
from math import prod
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "llama-1b": {"model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 22, "num_attention_heads": 32,
                 "num_key_value_heads": 4, "intermediate_size": 5632, "vocab_size": 32000},
    "llama-7b": {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
                 "num_key_value_heads": 32, "intermediate_size": 11008, "vocab_size": 32000},
    "bloom-1b1": {"model_type": "bloom", "hidden_size": 1536, "n_layer": 24, "n_head": 16, "vocab_size": 250880},
    "bloom-7b1": {"model_type": "bloom", "hidden_size": 4096, "n_layer": 30, "n_head": 32, "vocab_size": 250880},
}  # fmt: skip
COMMON: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "max_position_embeddings": 2048,
              "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2},
    "bloom": {"architectures": ["BloomForCausalLM"], "seq_length": 2048, "layer_norm_epsilon": 1e-5,
              "tie_word_embeddings": True, "apply_residual_connection_post_layernorm": False,
              "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3},
}  # fmt: skip
STD = 0.02
SHARD_BYTES = 1_000_000_000


def make(name: str, out: Path) -> Path:
    """A bf16 safetensors checkpoint of a shape of `SHAPES`; one that is there already is kept."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    if out.exists():
        return out
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    config = SHAPES[name] | COMMON[SHAPES[name]["model_type"]] | {"torch_dtype": "bfloat16"}
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(partial))
    tied = config["tie_word_embeddings"]
    shapes = {key: tuple(p.shape) for key, p in model.named_parameters() if not (tied and key == "lm_head.weight")}
    torch.manual_seed(0)
    shards = _shards(shapes)
    index: dict[str, str] = {}
    for number, keys in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({key: _values(key, shapes[key], torch) for key in keys}, partial / file, metadata={"format": "pt"})
        index |= dict.fromkeys(keys, file)
    total = 2 * sum(map(prod, shapes.values()))
    (partial / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2) + "\n"
    )
    write_tokenizer(partial, config["vocab_size"])
    partial.rename(out)
    return out


def _shards(shapes: dict[str, tuple[int, ...]]) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    used = 0
    for key, shape in shapes.items():
        if shards[-1] and used + 2 * prod(shape) > SHARD_BYTES:
            shards.append([])
            used = 0
        shards[-1].append(key)
        used += 2 * prod(shape)
    return shards


def _values(key: str, shape: tuple[int, ...], torch: Any) -> Any:
    tensor = torch.empty(shape, dtype=torch.bfloat16)
    return tensor.normal_(0, STD) if len(shape) > 1 else tensor.fill_(0.0 if key.endswith("bias") else 1.0)


def write_tokenizer(out: Path, size: int) -> None:
    """Bytes and a pair of them as tokens, since llama.cpp loads no vocabulary without merges, filled up to `size`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<unk>", "<s>", "</s>", "<pad>", *alphabet, "th"]
    words += [f"<extra_{i}>" for i in range(len(words), size)]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}) + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SHAPES)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    print(make(arguments.name, arguments.out))


if __name__ == "__main__":
    main()
