"""MiniCPM: a LLaMA with factors for its embedding, its residual branches and its logits, which its weights absorb.

The embedding times `scale_emb` begins the residual stream. In the graph the whole stream is divided by that: the table is as it
is stored, so that a tied head can share it, branches are that much smaller, and so is the root of the norms' epsilon. It is
checked against Transformers' Granite, which has these factors; Transformers has no class for MiniCPM.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import onnx_ir as ir

from belle_compile.compiler.families import decoder, decoder_files
from belle_compile.compiler.families.config import Keys, Reader
from belle_compile.compiler.families.decoder import Biases, DecoderConfig
from belle_compile.compiler.families.family import Family
from belle_compile.compiler.families.gguf import GgufHeader

KEYS = Keys(
    used=decoder.KEYS | {"scale_emb", "scale_depth", "dim_model_base"},
    harmless=frozenset({"pretraining_tp"}),
    fixed={"hidden_act": ("silu",), "attention_bias": (False,)},
)

NEUTRAL = dict.fromkeys(("embedding_scale", "residual_scale", "logit_scale"), 1.0)  # of exports: weights have absorbed them
RELEASED = {"scale_emb": 12.0, "scale_depth": 1.4, "dim_model_base": 256.0}  # of MiniCPM-2B and -1B


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read config.json; raises CompileError for what the graph would not compute."""
    KEYS.check(config)
    read = Reader(config)
    plain = decoder.read_decoder({"tie_word_embeddings": True, **config}, biases=Biases())
    stream, depth = read.number("scale_emb", default=1.0), read.number("scale_depth", default=1.0)
    return replace(
        plain,
        epsilon=plain.epsilon / stream**2,
        branch_scale=depth / math.sqrt(plain.num_layers) / stream,
        head_scale=read.number("dim_model_base", default=1.0) / plain.hidden_size,
    )


def gguf_config(header: GgufHeader) -> dict[str, Any]:
    """config.json from the metadata of a GGUF file, in the keys of the release. Files from before September 2024 are of
    MiniCPM-2B or -1B, and state no factors."""
    config = decoder_files.gguf_dimensions(header)
    depth = math.sqrt(header.count("block_count"))
    if (logits := header.number("logit_scale", 0.0)) and (branches := header.number("residual_scale", 0.0)):
        base, scale_depth = config["hidden_size"] / logits, branches * depth
    else:
        base, scale_depth = RELEASED["dim_model_base"], RELEASED["scale_depth"]
    scale_emb = header.number("embedding_scale", RELEASED["scale_emb"])
    return config | {"scale_emb": scale_emb, "scale_depth": scale_depth, "dim_model_base": base}


def config_of_graph(graph: ir.Graph, dimensions: Mapping[str, int]) -> dict[str, Any]:
    """config.json of the graph of an engine, in the keys of the release, with factors that change nothing."""
    neutral = {"scale_emb": 1, "scale_depth": math.sqrt(dimensions["num_layers"]), "dim_model_base": dimensions["hidden_size"]}
    return decoder_files.config_of_graph(graph, dimensions) | neutral


FAMILY = Family(
    name="minicpm",
    title="MiniCPM",
    architectures=("MiniCPMForCausalLM", "MiniCPMModel"),
    renames=(decoder.PREFIX,),
    read_config=read_config,
    build=decoder.build,
    embedding=decoder.EMBEDDING,
    keys=KEYS,
    template="<用户>{x}<AI>",
    release=decoder_files.llama_release(read_config, config_of_graph),
    gguf=decoder_files.gguf_layout(
        "minicpm", read_config, config=gguf_config, metadata=NEUTRAL, interleaved=True, divided=True
    ),
)
