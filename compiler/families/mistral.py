"""Mistral: a LLaMA whose layers may all have a sliding window; checked against Transformers' modeling_mistral.py.

GGUF files of Mistral models are files of the architecture llama, which has no windows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from belle_compile.compiler.families import decoder, decoder_files, windows
from belle_compile.compiler.families.config import Keys
from belle_compile.compiler.families.decoder import Biases, DecoderConfig
from belle_compile.compiler.families.family import Family

KEYS = Keys(used=decoder.KEYS | {"sliding_window", "layer_types"}, fixed={"hidden_act": ("silu",)})

# The instructions of the first releases; a system message is put in front of the next instruction.
TEMPLATE = (
    "{{- bos_token -}}{%- set ns = namespace(system='') -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{%- set ns.system = ns.system + message['content'] + '\\n\\n' -%}"
    "{%- elif message['role'] == 'user' -%}"
    "{{- '[INST] ' + ns.system + message['content'] + ' [/INST]' -}}{%- set ns.system = '' -%}"
    "{%- else -%}{{- ' ' + message['content'] + eos_token -}}{%- endif -%}"
    "{%- endfor -%}"
)


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read config.json; raises CompileError for what the graph would not compute."""
    KEYS.check(config)
    return decoder.read_decoder(config, biases=Biases(), windows=windows.same_windows(config))


def config_of_graph(graph: ir.Graph, dimensions: Mapping[str, int]) -> dict[str, Any]:
    """config.json of the graph of an engine, in the keys of Transformers' MistralConfig."""
    window = max(decoder_files.windows_of_graph(graph))
    return decoder_files.config_of_graph(graph, dimensions) | {"sliding_window": window or None}


FAMILY = Family(
    name="mistral",
    title="Mistral",
    architectures=("MistralForCausalLM", "MistralModel"),
    renames=(decoder.PREFIX,),
    read_config=read_config,
    build=decoder.build,
    embedding=decoder.EMBEDDING,
    keys=KEYS,
    template=TEMPLATE,
    release=decoder_files.own_release(config_of_graph),
)
