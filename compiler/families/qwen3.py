"""Qwen3, its dense models: a LLaMA whose q and k are normalized by head; checked against Transformers' modeling_qwen3.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from belle_compile.compiler.families import decoder, decoder_files, windows
from belle_compile.compiler.families.config import Keys, Reader
from belle_compile.compiler.families.decoder import Biases, DecoderConfig
from belle_compile.compiler.families.family import Family
from belle_compile.compiler.families.gguf import GgufHeader

DEFAULT_HEAD_DIM = 128  # of Transformers' class, whatever the hidden size

KEYS = Keys(used=decoder.KEYS | windows.KEYS | {"attention_bias"}, fixed={"hidden_act": ("silu",)})


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read config.json; raises CompileError for what the graph would not compute."""
    KEYS.check(config)
    biased = Reader(config).flag("attention_bias", default=False)
    return decoder.read_decoder(
        {"head_dim": DEFAULT_HEAD_DIM, **config},
        biases=Biases(qkv=biased, o=biased),
        windows=windows.qwen_windows(config),
        head_norms=True,
    )


def gguf_config(header: GgufHeader) -> dict[str, Any]:
    """config.json from the metadata of a GGUF file, in the keys of Transformers' Qwen3Config."""
    return decoder_files.gguf_dimensions(header) | {"attention_bias": "blk.0.attn_q.bias" in header.shapes}


def config_of_graph(graph: ir.Graph, dimensions: Mapping[str, int]) -> dict[str, Any]:
    """config.json of the graph of an engine, in the keys of Transformers' Qwen3Config."""
    keys = windows.window_keys(decoder_files.windows_of_graph(graph))
    keys["attention_bias"] = decoder_files.has_bias(graph, "self_attn.q_proj")
    return decoder_files.config_of_graph(graph, dimensions) | keys


FAMILY = Family(
    name="qwen3",
    title="Qwen3",
    architectures=("Qwen3ForCausalLM", "Qwen3Model"),
    renames=(decoder.PREFIX,),
    read_config=read_config,
    build=decoder.build,
    embedding=decoder.EMBEDDING,
    keys=KEYS,
    template="chatml",
    release=decoder_files.own_release(config_of_graph),
    gguf=decoder_files.gguf_layout("qwen3", read_config, config=gguf_config),
)
