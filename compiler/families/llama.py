"""LLaMA: checked against Transformers' modeling_llama.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from belle_compile.compiler.families import decoder, decoder_files
from belle_compile.compiler.families.config import Keys, Reader
from belle_compile.compiler.families.decoder import Biases, DecoderConfig
from belle_compile.compiler.families.family import Family
from belle_compile.compiler.families.gguf import GgufHeader

KEYS = Keys(
    used=decoder.KEYS | {"attention_bias", "mlp_bias"},
    # With pretraining_tp > 1 Transformers 4 adds up the same products in slices.
    harmless=frozenset({"pretraining_tp"}),
    fixed={
        "hidden_act": ("silu", "swish"),
        "rope_interleaved": (False,),
        "use_qk_norm": (False,),
        "qk_norm": (False,),
        "qk_layernorm": (False,),
        "qkv_bias": (False,),
        "use_bias": (False,),
        "bias": (False,),
        "no_bias": (True,),
        "alibi": (False,),
        "rms_norm": (True,),
        "position_embedding_type": ("rope", "rotary"),
    },
)


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read config.json; raises CompileError for what the graph would not compute."""
    KEYS.check(config)
    read = Reader(config)
    attention, mlp = read.flag("attention_bias", default=False), read.flag("mlp_bias", default=False)
    return decoder.read_decoder(config, biases=Biases(qkv=attention, o=attention, mlp=mlp))


def gguf_config(header: GgufHeader) -> dict[str, Any]:
    """config.json from the metadata of a GGUF file, in the keys of Transformers' LlamaConfig."""
    biases = {"attention_bias": "blk.0.attn_q.bias" in header.shapes, "mlp_bias": "blk.0.ffn_up.bias" in header.shapes}
    return decoder_files.gguf_dimensions(header) | biases


def config_of_graph(graph: ir.Graph, dimensions: Mapping[str, int]) -> dict[str, Any]:
    """config.json of the graph of an engine, in the keys of Transformers' LlamaConfig."""
    attention, mlp = (decoder_files.has_bias(graph, part) for part in ("self_attn.q_proj", "mlp.up_proj"))
    return decoder_files.config_of_graph(graph, dimensions) | {"attention_bias": attention, "mlp_bias": mlp}


FAMILY = Family(
    name="llama",
    title="LLaMA",
    architectures=("LlamaForCausalLM", "LlamaModel", "YiForCausalLM"),
    aliases=("yi",),  # the first releases of Yi, which name two norms otherwise
    renames=(decoder.PREFIX, (r"\.ln1\.", ".input_layernorm."), (r"\.ln2\.", ".post_attention_layernorm.")),
    read_config=read_config,
    build=decoder.build,
    embedding=decoder.EMBEDDING,
    keys=KEYS,
    template="belle-llama",
    template_by_vocabulary={79458: "belle-llama-ext"},  # BELLE-LLaMA-EXT: LLaMA's 32000 pieces and BELLE's Chinese ones
    release=decoder_files.own_release(config_of_graph),
    gguf=decoder_files.gguf_layout(
        "llama", read_config, config=gguf_config, interleaved=True, divided=True
    ),  # frequencies of Llama 3.1 and later are divided
)
