"""Writes a LLaMA or BLOOM checkpoint as GGUF in its stored precision, one tensor in memory at a time.

gguf_from_hf.py MODEL OUT        # under the interpreter of the hf environment
gguf_from_hf.py --bytes FILE     # bytes that a decoding step reads of a GGUF
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import safe_open

TOP = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "transformer.word_embeddings": "token_embd",
    "transformer.word_embeddings_layernorm": "token_embd_norm",
    "transformer.ln_f": "output_norm",
}
LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "self_attention.query_key_value": "attn_qkv",
    "self_attention.dense": "attn_output",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(name: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight"""
    module, _, kind = name.rpartition(".")
    if module in TOP:
        return f"{TOP[module]}.{kind}"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{LAYER[rest]}.{kind}"


def head_count(config: dict[str, Any]) -> int:
    """BLOOM has it as n_head."""
    heads: int = config["num_attention_heads"] if "num_attention_heads" in config else config["n_head"]
    return heads


def reorder(name: str, t: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    """Rows in the order llama.cpp expects."""
    heads = head_count(config)
    if name.endswith(("q_proj.weight", "k_proj.weight")):
        # Transformers rotates the two halves of a head, llama.cpp rotates neighbouring rows.
        heads = config["num_key_value_heads"] if "k_proj" in name else heads
        return t.reshape(heads, 2, -1, t.shape[1]).transpose(1, 2).reshape(t.shape)
    if "query_key_value" in name:
        # BLOOM interleaves q, k and v head by head; llama.cpp wants all of q, then k, then v.
        return t.reshape(heads, 3, -1, *t.shape[1:]).transpose(0, 1).reshape(t.shape)
    return t


def add_tokenizer(writer: gguf.GGUFWriter, model: Path, config: dict[str, Any]) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    size = config["vocab_size"]
    tokens = [f"<pad_{i}>" for i in range(size)]
    types = [gguf.TokenType.UNUSED] * size
    for token, i in tokenizer["model"]["vocab"].items():
        if i < size:
            tokens[i], types[i] = token, gguf.TokenType.NORMAL
    for entry in tokenizer["added_tokens"]:
        tokens[entry["id"]] = entry["content"]
        types[entry["id"]] = gguf.TokenType.CONTROL if entry.get("special") else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm" if config["model_type"] == "llama" else "bloom")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    ends = config["eos_token_id"]
    writer.add_eos_token_id(ends[0] if isinstance(ends, list) else ends)
    writer.add_add_bos_token(False)


def add_config(writer: gguf.GGUFWriter, model: Path, config: dict[str, Any]) -> None:
    hidden, heads = config["hidden_size"], head_count(config)
    writer.add_name(model.name)
    writer.add_embedding_length(hidden)
    writer.add_head_count(heads)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    if config["model_type"] == "llama":
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_rope_dimension_count(hidden // heads)
        writer.add_rope_freq_base(config["rope_theta"])
        writer.add_vocab_size(config["vocab_size"])
    else:
        writer.add_block_count(config["n_layer"])
        writer.add_context_length(config["seq_length"])
        writer.add_feed_forward_length(4 * hidden)
        writer.add_head_count_kv(heads)
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])


def write_gguf(model: Path, out: Path) -> None:
    """Matrices keep their type (bf16 or fp32); vectors become fp32, as llama.cpp wants."""
    config = json.loads((model / "config.json").read_text())
    if config["model_type"] not in ("llama", "bloom"):
        raise ValueError(f"{model}: model_type is {config['model_type']}, expected llama or bloom")
    writer = gguf.GGUFWriter(str(out), config["model_type"])
    add_config(writer, model, config)
    add_tokenizer(writer, model, config)
    files: list[Any] = [safe_open(str(file), "pt") for file in sorted(model.glob("*.safetensors"))]
    tensors = [(name, file) for file in files for name in file.keys()]
    for name, file in tensors:
        part = file.get_slice(name)
        shape, bf16 = part.get_shape(), part.get_dtype() == "BF16" and len(part.get_shape()) > 1
        writer.add_tensor_info(
            gguf_name(name),
            shape,
            np.dtype(np.float32),
            int(np.prod(shape)) * (2 if bf16 else 4),
            gguf.GGMLQuantizationType.BF16 if bf16 else None,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, file in tensors:
        t = reorder(name, file.get_tensor(name), config).contiguous()
        bf16 = t.dtype == torch.bfloat16 and t.ndim > 1
        writer.write_tensor_data(t.view(torch.int16).numpy() if bf16 else t.float().numpy())
    writer.close()


def bytes_per_token(file: Path) -> int:
    """Bytes of all tensors, less the embedding table where the output matrix is another tensor."""
    size = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(str(file)).tensors}
    return sum(size.values()) - (size["token_embd.weight"] if "output.weight" in size else 0)


def main() -> None:
    first, second = sys.argv[1:]
    if first == "--bytes":
        print(bytes_per_token(Path(second)))
    else:
        write_gguf(Path(first), Path(second))


if __name__ == "__main__":
    main()
