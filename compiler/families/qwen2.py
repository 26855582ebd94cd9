"""Qwen2 and Qwen2.5: a LLaMA whose q, k and v have biases; checked against Transformers' modeling_qwen2.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from belle_compile.compiler.families import decoder, decoder_files, windows
from belle_compile.compiler.families.config import Keys
from belle_compile.compiler.families.decoder import Biases, DecoderConfig
from belle_compile.compiler.families.family import Family

KEYS = Keys(
    used=decoder.KEYS | windows.KEYS,
    fixed={"hidden_act": ("silu",), "use_mrope": (False,), "qkv_bias": (True,)},
)


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read config.json; raises CompileError for what the graph would not compute."""
    KEYS.check(config)
    return decoder.read_decoder(config, biases=Biases(qkv=True), windows=windows.qwen_windows(config))


def config_of_graph(graph: ir.Graph, dimensions: Mapping[str, int]) -> dict[str, Any]:
    """config.json of the graph of an engine, in the keys of Transformers' Qwen2Config."""
    return decoder_files.config_of_graph(graph, dimensions) | windows.window_keys(decoder_files.windows_of_graph(graph))


FAMILY = Family(
    name="qwen2",
    title="Qwen2",
    architectures=("Qwen2ForCausalLM", "Qwen2Model"),
    renames=(decoder.PREFIX,),
    read_config=read_config,
    build=decoder.build,
    embedding=decoder.EMBEDDING,
    keys=KEYS,
    template="chatml",
    release=decoder_files.own_release(config_of_graph),
    gguf=decoder_files.gguf_layout("qwen2", read_config),
)
