"""InternLM2 and InternLM2.5: a LLaMA whose tensors have other names, and q, k and v are one tensor, grouped by heads.

It is checked against Transformers' LLaMA with these tensors taken apart; Transformers has no class for it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from belle_compile.compiler.families import decoder, decoder_files
from belle_compile.compiler.families.config import Keys, Reader
from belle_compile.compiler.families.decoder import Biases, DecoderConfig
from belle_compile.compiler.families.family import Family
from belle_compile.compiler.families.gguf import GgufHeader
from belle_compile.compiler.families.layers import Part

KEYS = Keys(
    used=decoder.KEYS | {"bias"},
    harmless=frozenset({"pretraining_tp"}),
    fixed={"hidden_act": ("silu",)},
)

_PROJECTION = re.compile(r"(?P<attention>.*\.self_attn)\.(?P<part>[qkv])_proj\.(?P<kind>weight|bias)")


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read config.json; raises CompileError for what the graph would not compute."""
    KEYS.check(config)
    biased = Reader(config).flag("bias", default=False)
    return decoder.read_decoder(config, biases=Biases(qkv=biased, o=biased))


def part_of(config: DecoderConfig, name: str) -> Part | None:
    """The rows of wqkv that are q, k or v: each key/value head has those of its query heads, its key and its value together."""
    match = _PROJECTION.fullmatch(name)
    if match is None:
        return None
    group, head_dim = config.num_heads // config.num_kv_heads, config.head_dim
    first, last = {"q": (0, group), "k": (group, group + 1), "v": (group + 1, group + 2)}[match["part"]]
    starts = [head * (group + 2) for head in range(config.num_kv_heads)]
    ranges = tuple(((start + first) * head_dim, (start + last) * head_dim) for start in starts)
    return Part(f"{match['attention']}.wqkv.{match['kind']}", config.num_kv_heads * (group + 2) * head_dim, ranges)


def gguf_config(header: GgufHeader) -> dict[str, Any]:
    """config.json from the metadata of a GGUF file, in the keys of the release."""
    return decoder_files.gguf_dimensions(header) | {"bias": "blk.0.attn_q.bias" in header.shapes}


def config_of_graph(graph: ir.Graph, dimensions: Mapping[str, int]) -> dict[str, Any]:
    """config.json of the graph of an engine, in the keys of the release."""
    return decoder_files.config_of_graph(graph, dimensions) | {"bias": decoder_files.has_bias(graph, "self_attn.q_proj")}


FAMILY = Family(
    name="internlm2",
    title="InternLM2",
    architectures=("InternLM2ForCausalLM", "InternLM2Model"),
    renames=(
        (r"^(?=(tok_embeddings|layers|norm)\.)", "model."),
        (r"^model\.tok_embeddings\.", "model.embed_tokens."),
        (r"^output\.", "lm_head."),
        (r"\.attention\.wqkv\.", ".self_attn.wqkv."),
        (r"\.attention\.wo\.", ".self_attn.o_proj."),
        (r"\.attention_norm\.", ".input_layernorm."),
        (r"\.ffn_norm\.", ".post_attention_layernorm."),
        (r"\.feed_forward\.w1\.", ".mlp.gate_proj."),
        (r"\.feed_forward\.w2\.", ".mlp.down_proj."),
        (r"\.feed_forward\.w3\.", ".mlp.up_proj."),
    ),
    read_config=read_config,
    build=decoder.build,
    embedding=decoder.EMBEDDING,
    part_of=part_of,
    keys=KEYS,
    template="chatml",
    release=decoder_files.llama_release(read_config, config_of_graph),
    gguf=decoder_files.gguf_layout("internlm2", read_config, config=gguf_config, interleaved=True),
)
