"""A family that the product does not have: all that a relative of LLaMA with biases of q, k and v takes, in one module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from belle_compile.compiler.families import Family, decoder, decoder_files
from belle_compile.compiler.families.config import Keys
from belle_compile.compiler.families.gguf import GgufLayout

KEYS = Keys(
    used=decoder.KEYS,
    harmless=frozenset({"pretraining_tp"}),  # Transformers does not read it
    fixed={"hidden_act": ("silu",), "attention_bias": (True,), "attention_out_bias": (False,), "mlp_bias": (False,)},
)


def read_config(config: Mapping[str, Any]) -> decoder.DecoderConfig:
    KEYS.check(config)
    return decoder.read_decoder(config, biases=decoder.Biases(qkv=True))


GGUF = GgufLayout(
    architectures=("tinyseed",),
    read_config=decoder_files.gguf_dimensions,
    modules=decoder_files.GGUF_MODULES | {"attn_value": "self_attn.v_proj"},
    layers="model.layers",
)

FAMILY = Family(
    name="tinyseed",
    title="TinySeed",
    aliases=("seed_oss",),
    architectures=("TinySeedForCausalLM",),
    renames=((r"^tiny\.", "model."), (r"\.attention\.w([qkvo])\.", r".self_attn.\1_proj.")),
    read_config=read_config,
    build=decoder.build,
    embedding=decoder.EMBEDDING,
    template="<|user|>{x}<|assistant|>",
    template_by_vocabulary={313: "raw"},
    gguf=GGUF,
)
