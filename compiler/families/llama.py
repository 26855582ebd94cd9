"""LLaMA: RMSNorm, RoPE, grouped-query attention, SwiGLU; checked against Transformers' modeling_llama.py."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from belle_compile.compiler.families import rope
from belle_compile.compiler.families.config import Keys, Reader
from belle_compile.compiler.families.layers import Layers
from belle_compile.compiler.ir.build import GraphBuilder

if TYPE_CHECKING:
    from belle_compile.compiler.checkpoint import Checkpoint

KEYS = Keys(
    used=rope.KEYS.union(
        """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
        rms_norm_eps attention_bias mlp_bias tie_word_embeddings
        """.split()
    ),
    # pretraining_tp > 1 only had Transformers 4 sum the same products in slices. max_sequence_length is of early
    # conversions, which nothing reads.
    harmless=frozenset({"pretraining_tp", "max_sequence_length"}),
    fixed={"hidden_act": ("silu", "swish"), "rope_interleaved": (False,), "use_qk_norm": (False,), "qk_layernorm": (False,)},
)


@dataclass(frozen=True, eq=False)
class LlamaConfig:
    """What config.json says of a LLaMA model."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    epsilon: float
    attention_bias: bool
    mlp_bias: bool
    tied_head: bool
    rope: rope.Rope

    @property
    def metadata(self) -> dict[str, str]:
        """metadata_props of the model."""
        facts = {
            "family": "llama",
            "num_layers": self.num_layers,
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "max_position": self.rope.max_position,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
        }
        if self.rope.dynamic_factor:  # sequences longer than this rotate all tokens of a step by their own length
            facts["dynamic_rope_from"] = self.rope.original_max
        return {key: str(value) for key, value in facts.items()}


def read_config(config: Mapping[str, Any]) -> LlamaConfig:
    """The model config.json describes; raises CompileError at what this frontend does not build."""
    KEYS.check(config)
    read = Reader(config)
    hidden, heads = read.integer("hidden_size"), read.integer("num_attention_heads")
    kv_heads = read.integer("num_key_value_heads", default=heads)
    if heads % kv_heads:
        raise read.error("num_key_value_heads", str(kv_heads), f"a divisor of num_attention_heads, {heads}")
    if read.get("head_dim") is None and hidden % heads:
        raise read.error("num_attention_heads", str(heads), f"a divisor of hidden_size, {hidden}, or a head_dim")
    head_dim = read.integer("head_dim", default=hidden // heads)
    return LlamaConfig(
        vocab_size=read.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=read.integer("intermediate_size"),
        num_layers=read.integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        epsilon=read.number("rms_norm_eps", default=1e-6),
        attention_bias=read.flag("attention_bias", default=False),
        mlp_bias=read.flag("mlp_bias", default=False),
        tied_head=read.flag("tie_word_embeddings", default=False),
        rope=rope.read_rope(config, head_dim),
    )


def build(checkpoint: Checkpoint) -> ir.Model:
    """The graph of a LLaMA checkpoint."""
    config = read_config(checkpoint.config)
    b = GraphBuilder("llama")
    layers = Layers(checkpoint, b)
    vocabulary = config.vocab_size, config.hidden_size
    table, head = layers.embedding_and_head("model.embed_tokens", vocabulary, tied=config.tied_head)
    x = b.op("Gather", table, b.inputs.token_ids, name="model.embed_tokens", axis=0)
    cos_sin = b.op(
        "RotaryTable",
        b.inputs.positions,
        b.inputs.sequences,
        b.weight("model.rotary_emb.inv_freq", config.rope.inv_freq),
        name="model.rotary_emb",
        attention_scaling=1.0,
        dynamic_factor=config.rope.dynamic_factor,
        original_max=config.rope.original_max,
        base=config.rope.base,
    )
    for layer in range(config.num_layers):
        x = _block(b, layers, config, x, cos_sin, layer)
    x = b.op("Gather", x, b.inputs.logit_rows, name="rows", axis=0)
    x = layers.rms_norm(x, "model.norm", config.hidden_size, config.epsilon)
    logits = b.op("Gemm", x, head, name="lm_head", transB=1)
    layers.check_all_taken()
    return b.finish(logits, config.metadata)


def _block(b: GraphBuilder, layers: Layers, config: LlamaConfig, x: ir.Value, cos_sin: ir.Value, layer: int) -> ir.Value:
    prefix, hidden, inner = f"model.layers.{layer}", config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    bias = config.attention_bias
    normed = layers.rms_norm(x, f"{prefix}.input_layernorm", hidden, config.epsilon)
    q = layers.linear(normed, f"{prefix}.self_attn.q_proj", (q_size, hidden), bias=bias)
    k = layers.linear(normed, f"{prefix}.self_attn.k_proj", (kv_size, hidden), bias=bias)
    v = layers.linear(normed, f"{prefix}.self_attn.v_proj", (kv_size, hidden), bias=bias)
    step = b.inputs
    attended = b.op(
        "Attention",
        q,
        k,
        v,
        step.positions,
        step.sequences,
        step.block_table,
        cos_sin,
        name=f"{prefix}.self_attn",
        layer=layer,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        scale=1 / math.sqrt(config.head_dim),
    )
    attended = layers.linear(attended, f"{prefix}.self_attn.o_proj", (hidden, q_size), bias=bias)
    x = b.op("Add", attended, x, name=f"{prefix}.self_attn.residual")
    normed = layers.rms_norm(x, f"{prefix}.post_attention_layernorm", hidden, config.epsilon)
    gate = layers.linear(normed, f"{prefix}.mlp.gate_proj", (inner, hidden), bias=config.mlp_bias)
    up = layers.linear(normed, f"{prefix}.mlp.up_proj", (inner, hidden), bias=config.mlp_bias)
    gated = b.op("SwiGLU", gate, up, name=f"{prefix}.mlp.swiglu")
    down = layers.linear(gated, f"{prefix}.mlp.down_proj", (hidden, inner), bias=config.mlp_bias)
    return b.op("Add", down, x, name=f"{prefix}.mlp.residual")
