"""A family that the product does not have: all that a relative of LLaMA with biases of q, k and v takes, in one module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from belle_compile.compiler.families import Family, llama
from belle_compile.compiler.families.config import Keys
from belle_compile.compiler.families.gguf import GgufLayout

KEYS = Keys(
    used=llama.KEYS.used - {"attention_bias", "mlp_bias"},
    harmless=frozenset({"max_window_layers"}),  # without use_sliding_window it is not read
    fixed={"hidden_act": ("silu",)},
)


def read_config(config: Mapping[str, Any]) -> llama.LlamaConfig:
    KEYS.check(config)
    return llama.config_with_biases(config, qkv_bias=True, o_bias=False, mlp_bias=False)


GGUF = GgufLayout(
    architectures=("tinyqwen",),
    read_config=llama.gguf_dimensions,
    modules=llama.GGUF_MODULES | {"attn_value": "self_attn.v_proj"},
    layers="model.layers",
)

FAMILY = Family(
    embedding="model.embed_tokens",
    name="tinyqwen",
    title="TinyQwen",
    aliases=("qwen2",),
    architectures=("TinyQwenForCausalLM",),
    renames=((r"^tiny\.", "model."), (r"\.attention\.w([qkvo])\.", r".self_attn.\1_proj.")),
    read_config=read_config,
    build=llama.build,
    template="<|user|>{x}<|assistant|>",
    template_by_vocabulary={313: "raw"},
    gguf=GGUF,
)
