"""The decoder of LLaMA and its relatives: RMSNorm, RoPE, grouped-query attention, SwiGLU; options are what they differ in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from belle_compile.compiler.families import rope
from belle_compile.compiler.families.config import MOST_LAYERS, Reader
from belle_compile.compiler.families.layers import Layers
from belle_compile.compiler.families.model_config import ModelConfig

# The keys of config.json that `read_decoder` reads.
KEYS = rope.KEYS.union(
    """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    rms_norm_eps tie_word_embeddings
    """.split()
)

EMBEDDING = "model.embed_tokens"
PREFIX = r"^(?=(embed_tokens|layers|norm)\.)", "model."  # files saved without the head lack the prefix


@dataclass(frozen=True)
class Biases:
    """Which linear layers of a decoder have biases: those for queries, keys and values; the attention's output; the MLP's."""

    qkv: bool = False
    o: bool = False
    mlp: bool = False


@dataclass(frozen=True, eq=False, kw_only=True)
class DecoderConfig(ModelConfig):
    """The configuration of a decoder, from config.json, and its options.

    `windows` has the number of tokens that each layer attends to, a token itself among them; 0 where it attends to all. With
    `head_norms`, each head of q and k is normalized before it is rotated. `branch_scale` multiplies what attention and MLP add
    to the residual stream, and `head_scale` the logits; weights absorb both.
    """

    rope: rope.Rope
    biases: Biases
    windows: tuple[int, ...]
    head_norms: bool
    branch_scale: float = 1.0
    head_scale: float = 1.0

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata of every family and, with dynamic RoPE scaling, `dynamic_rope_from`: the length beyond which the base
        grows."""
        dynamic = {"dynamic_rope_from": str(self.rope.original_max)} if self.rope.dynamic_factor else {}
        return super().metadata | dynamic


def read_decoder(
    config: Mapping[str, Any], *, biases: Biases, windows: Sequence[int] = (), head_norms: bool = False
) -> DecoderConfig:
    """Read the keys of config.json that all decoders have; the caller checks the other keys and passes the options.

    `windows` are those of `DecoderConfig`; none at all stands for no windows. A window as long as the longest sequence has no
    effect and becomes 0.
    """
    read = Reader(config)
    hidden, heads = read.integer("hidden_size"), read.integer("num_attention_heads")
    kv_heads = read.integer("num_key_value_heads", default=heads)
    if heads % kv_heads:
        raise read.error("num_key_value_heads", str(kv_heads), f"a divisor of num_attention_heads, {heads}")
    if read.get("head_dim") is None and hidden % heads:
        raise read.error("num_attention_heads", str(heads), f"a divisor of hidden_size, {hidden}, or a head_dim")
    head_dim = read.integer("head_dim", default=hidden // heads)
    rotary = rope.read_rope(config, head_dim)
    layers = read.integer("num_hidden_layers", most=MOST_LAYERS)
    return DecoderConfig(
        vocab_size=read.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=read.integer("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_position=rotary.max_position,
        epsilon=read.number("rms_norm_eps", default=1e-6),
        tied_head=read.flag("tie_word_embeddings", default=False),
        biases=biases,
        head_norms=head_norms,
        windows=tuple(window if window < rotary.max_position else 0 for window in windows or [0] * layers),
        rope=rotary,
    )


def build(layers: Layers, config: DecoderConfig) -> ir.Value:
    """Append the whole model to the graph; returns the logits [R, vocabulary]."""
    b = layers.builder
    vocabulary = config.vocab_size, config.hidden_size
    table, head = layers.embedding_and_head(EMBEDDING, vocabulary, tied=config.tied_head)
    x = b.op("Gather", table, b.inputs.token_ids, name=EMBEDDING, axis=0)
    cos_sin = b.op(
        "RotaryTable",
        b.inputs.positions,
        b.inputs.sequences,
        b.weight("model.rotary_emb.inv_freq", config.rope.inv_freq),
        name="model.rotary_emb",
        attention_scaling=config.rope.attention_scaling,
        dynamic_factor=config.rope.dynamic_factor,
        original_max=config.rope.original_max,
        base=config.rope.base,
    )
    for layer in range(config.num_layers):
        x = _attention(layers, config, x, cos_sin, layer)
        x = _feed_forward(layers, config, x, f"model.layers.{layer}")
    x = b.op("Gather", x, b.inputs.logit_rows, name="rows", axis=0)
    x = layers.rms_norm(x, "model.norm", config.hidden_size, config.epsilon, scale=config.head_scale)
    return b.op("Gemm", x, head, name="lm_head", transB=1)


def _attention(layers: Layers, config: DecoderConfig, x: ir.Value, cos_sin: ir.Value, layer: int) -> ir.Value:
    b, hidden, biases = layers.builder, config.hidden_size, config.biases
    prefix = f"model.layers.{layer}"
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    normed = layers.rms_norm(x, f"{prefix}.input_layernorm", hidden, config.epsilon)
    q = layers.linear(normed, f"{prefix}.self_attn.q_proj", (q_size, hidden), bias=biases.qkv)
    k = layers.linear(normed, f"{prefix}.self_attn.k_proj", (kv_size, hidden), bias=biases.qkv)
    v = layers.linear(normed, f"{prefix}.self_attn.v_proj", (kv_size, hidden), bias=biases.qkv)
    if config.head_norms:
        q = layers.head_norm(q, f"{prefix}.self_attn.q_norm", config.head_dim, config.epsilon)
        k = layers.head_norm(k, f"{prefix}.self_attn.k_norm", config.head_dim, config.epsilon)
    step, window = b.inputs, config.windows[layer]
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
        **({"window": window} if window else {}),
    )
    attended = layers.linear(attended, f"{prefix}.self_attn.o_proj", (hidden, q_size), bias=biases.o, scale=config.branch_scale)
    return b.op("Add", attended, x, name=f"{prefix}.self_attn.residual")


def _feed_forward(layers: Layers, config: DecoderConfig, x: ir.Value, prefix: str) -> ir.Value:
    b, hidden, inner, bias = layers.builder, config.hidden_size, config.intermediate_size, config.biases.mlp
    normed = layers.rms_norm(x, f"{prefix}.post_attention_layernorm", hidden, config.epsilon)
    gate = layers.linear(normed, f"{prefix}.mlp.gate_proj", (inner, hidden), bias=bias)
    up = layers.linear(normed, f"{prefix}.mlp.up_proj", (inner, hidden), bias=bias)
    gated = b.op("SwiGLU", gate, up, name=f"{prefix}.mlp.swiglu")
    down = layers.linear(gated, f"{prefix}.mlp.down_proj", (hidden, inner), bias=bias, scale=config.branch_scale)
    return b.op("Add", down, x, name=f"{prefix}.mlp.residual")
