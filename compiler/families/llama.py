"""LLaMA: RMSNorm, RoPE, grouped-query attention, SwiGLU; checked against Transformers' modeling_llama.py."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.families import rope
from belle_compile.compiler.families.config import Keys, Reader
from belle_compile.compiler.families.family import Family
from belle_compile.compiler.families.gguf import GgufHeader, GgufLayout
from belle_compile.compiler.families.layers import Layers
from belle_compile.compiler.families.model_config import STAGE, ModelConfig
from belle_compile.compiler.families.release import Release
from belle_compile.compiler.ir.ops import attributes_of, operand
from belle_compile.compiler.ir.signature import Role

EMBEDDING = "model.embed_tokens"
KEYS = Keys(
    used=rope.KEYS.union(
        """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
        rms_norm_eps attention_bias mlp_bias tie_word_embeddings
        """.split()
    ),
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


@dataclass(frozen=True, eq=False, kw_only=True)
class LlamaConfig(ModelConfig):
    """The configuration of a LLaMA model, from config.json, and which of its linear layers have biases."""

    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    rope: rope.Rope

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata of every family and, with dynamic RoPE scaling, `dynamic_rope_from`: the length beyond which the base
        grows."""
        dynamic = {"dynamic_rope_from": str(self.rope.original_max)} if self.rope.dynamic_factor else {}
        return super().metadata | dynamic


def read_config(config: Mapping[str, Any]) -> LlamaConfig:
    """Read config.json; raises CompileError for what the graph would not compute."""
    KEYS.check(config)
    read = Reader(config)
    attention_bias, mlp_bias = read.flag("attention_bias", default=False), read.flag("mlp_bias", default=False)
    return config_with_biases(config, qkv_bias=attention_bias, o_bias=attention_bias, mlp_bias=mlp_bias)


def config_with_biases(config: Mapping[str, Any], *, qkv_bias: bool, o_bias: bool, mlp_bias: bool) -> LlamaConfig:
    """Read the keys of config.json that LLaMA and its relatives share; the caller checks the other keys and passes the
    biases."""
    read = Reader(config)
    hidden, heads = read.integer("hidden_size"), read.integer("num_attention_heads")
    kv_heads = read.integer("num_key_value_heads", default=heads)
    if heads % kv_heads:
        raise read.error("num_key_value_heads", str(kv_heads), f"a divisor of num_attention_heads, {heads}")
    if read.get("head_dim") is None and hidden % heads:
        raise read.error("num_attention_heads", str(heads), f"a divisor of hidden_size, {hidden}, or a head_dim")
    head_dim = read.integer("head_dim", default=hidden // heads)
    rotary = rope.read_rope(config, head_dim)
    return LlamaConfig(
        vocab_size=read.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=read.integer("intermediate_size"),
        num_layers=read.integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_position=rotary.max_position,
        epsilon=read.number("rms_norm_eps", default=1e-6),
        tied_head=read.flag("tie_word_embeddings", default=False),
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        mlp_bias=mlp_bias,
        rope=rotary,
    )


def build(layers: Layers, config: LlamaConfig) -> ir.Value:
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
        attention_scaling=1.0,
        dynamic_factor=config.rope.dynamic_factor,
        original_max=config.rope.original_max,
        base=config.rope.base,
    )
    for layer in range(config.num_layers):
        x = _block(layers, config, x, cos_sin, layer)
    x = b.op("Gather", x, b.inputs.logit_rows, name="rows", axis=0)
    x = layers.rms_norm(x, "model.norm", config.hidden_size, config.epsilon)
    return b.op("Gemm", x, head, name="lm_head", transB=1)


def _block(layers: Layers, config: LlamaConfig, x: ir.Value, cos_sin: ir.Value, layer: int) -> ir.Value:
    b, prefix, hidden, inner = layers.builder, f"model.layers.{layer}", config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    normed = layers.rms_norm(x, f"{prefix}.input_layernorm", hidden, config.epsilon)
    q = layers.linear(normed, f"{prefix}.self_attn.q_proj", (q_size, hidden), bias=config.qkv_bias)
    k = layers.linear(normed, f"{prefix}.self_attn.k_proj", (kv_size, hidden), bias=config.qkv_bias)
    v = layers.linear(normed, f"{prefix}.self_attn.v_proj", (kv_size, hidden), bias=config.qkv_bias)
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
    attended = layers.linear(attended, f"{prefix}.self_attn.o_proj", (hidden, q_size), bias=config.o_bias)
    x = b.op("Add", attended, x, name=f"{prefix}.self_attn.residual")
    normed = layers.rms_norm(x, f"{prefix}.post_attention_layernorm", hidden, config.epsilon)
    gate = layers.linear(normed, f"{prefix}.mlp.gate_proj", (inner, hidden), bias=config.mlp_bias)
    up = layers.linear(normed, f"{prefix}.mlp.up_proj", (inner, hidden), bias=config.mlp_bias)
    gated = b.op("SwiGLU", gate, up, name=f"{prefix}.mlp.swiglu")
    down = layers.linear(gated, f"{prefix}.mlp.down_proj", (hidden, inner), bias=config.mlp_bias)
    return b.op("Add", down, x, name=f"{prefix}.mlp.residual")


def gguf_config(header: GgufHeader) -> dict[str, Any]:
    """config.json from the metadata of a GGUF file, in the keys of Transformers' LlamaConfig."""
    biases = {"attention_bias": "blk.0.attn_q.bias" in header.shapes, "mlp_bias": "blk.0.ffn_up.bias" in header.shapes}
    return gguf_dimensions(header) | biases


def gguf_dimensions(header: GgufHeader) -> dict[str, Any]:
    """The keys of config.json that LLaMA and its relatives share, from the metadata of a GGUF file; raises CompileError for a
    variant that is not supported."""
    number = header.number
    heads, hidden = header.count("attention.head_count"), header.count("embedding_length")
    head_dim = number("attention.key_length", hidden // heads)
    rotary = number("rope.dimension_count", head_dim)
    if rotary != head_dim or number("attention.value_length", head_dim) != head_dim or number("expert_count", 0):
        raise CompileError(
            STAGE,
            f"metadata of {header.file}",
            found="partial rotary, uneven heads or experts",
            expected=f"a plain {header.title}",
            remedy="this variant is not supported",
        )
    return {
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": header.vocabulary("token_embd.weight"),
        "max_position_embeddings": number("context_length"),
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "rope_theta": number("rope.freq_base", 10000.0),
        "rope_scaling": _gguf_rope_scaling(header),
        "tie_word_embeddings": "output.weight" not in header.shapes,
    }


def _gguf_rope_scaling(header: GgufHeader) -> dict[str, Any] | None:
    linear = header.value("rope.scale_linear")  # the only key of files from before August 2023
    kind = header.value("rope.scaling.type", "linear" if linear else "none")
    if kind == "none":
        return None
    scaling = {"rope_type": kind, "factor": header.value("rope.scaling.factor", linear or 1.0)}
    original = header.value("rope.scaling.original_context_length")
    return scaling | ({"original_max_position_embeddings": original} if original is not None else {})


def config_of_graph(graph: ir.Graph, dimensions: Mapping[str, int]) -> dict[str, Any]:
    """config.json of the graph of an engine, in the keys of Transformers' LlamaConfig."""
    nodes = {str(node.name): node for node in graph}
    norm = next(node for node in graph if node.op_type == "RMSNormalization")
    biased = {
        part: operand(nodes[f"model.layers.0.{part}"], Role.BIAS) is not None for part in ("self_attn.q_proj", "mlp.up_proj")
    }
    table = nodes["model.rotary_emb"]
    frequencies = operand(table, Role.FREQUENCY)
    assert frequencies is not None and frequencies.const_value is not None
    return {
        "vocab_size": dimensions["vocab_size"],
        "hidden_size": dimensions["hidden_size"],
        "intermediate_size": dimensions["intermediate_size"],
        "num_hidden_layers": dimensions["num_layers"],
        "num_attention_heads": dimensions["num_heads"],
        "num_key_value_heads": dimensions["num_kv_heads"],
        "head_dim": dimensions["head_dim"],
        "hidden_act": "silu",
        "rms_norm_eps": attributes_of(norm)["epsilon"],
        "attention_bias": biased["self_attn.q_proj"],
        "mlp_bias": biased["mlp.up_proj"],
    } | rope.config_of(frequencies.const_value.numpy(), attributes_of(table), dimensions["max_position"])


def gguf_metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of a GGUF file, as llama.cpp's converter writes it, from config.json."""
    read = read_config(config)
    if read.rope.dynamic_factor:
        expected = "default, linear or llama3 rope parameters, which are those that llama.cpp computes"
        raise Reader(config).error("rope_scaling", "dynamic", expected, "use another --format")
    scaling = rope.linear_factor(config)
    scaled = {"rope.scaling.type": "linear", "rope.scaling.factor": scaling} if scaling else {}
    return {
        "vocab_size": read.vocab_size,
        "context_length": rope.stated_length(config),
        "embedding_length": read.hidden_size,
        "feed_forward_length": read.intermediate_size,
        "block_count": read.num_layers,
        "attention.head_count": read.num_heads,
        "attention.head_count_kv": read.num_kv_heads,
        "attention.key_length": read.head_dim,
        "attention.value_length": read.head_dim,
        "attention.layer_norm_rms_epsilon": read.epsilon,
        "rope.dimension_count": read.head_dim,
        "rope.freq_base": rope.stated_base(config),
    } | scaled


def gguf_divisors(config: Mapping[str, Any]) -> list[float]:
    """The divisors of the rotary frequencies in a GGUF file: those that config.json has, or those that make llama3's."""
    return rope.divisors(config, read_config(config).head_dim)


def release_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json as it is; raises CompileError for rotary frequencies of a GGUF file that no key of it expresses."""
    if config.get("rope_divisors") is not None:
        expected = "rope parameters in config.json"
        remedy = "give the Hugging Face checkpoint of this model"
        raise Reader(config).error("rope_divisors", "divisors of a GGUF file", expected, remedy)
    return {key: value for key, value in config.items() if value is not None}


GGUF_MODULES = {
    "token_embd": EMBEDDING,
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

FAMILY = Family(
    name="llama",
    title="LLaMA",
    architectures=("LlamaForCausalLM", "LlamaModel"),
    renames=((r"^(?=(embed_tokens|layers|norm)\.)", "model."),),  # files saved from LlamaModel lack the prefix
    read_config=read_config,
    build=build,
    embedding=EMBEDDING,
    keys=KEYS,
    template="belle-llama",
    template_by_vocabulary={79458: "belle-llama-ext"},  # BELLE-LLaMA-EXT: LLaMA's 32000 pieces and BELLE's Chinese ones
    release=Release(norm="RMSNormalization", config=release_config, config_of_graph=config_of_graph),
    gguf=GgufLayout(
        architectures=("llama",),
        read_config=gguf_config,
        modules=GGUF_MODULES,
        layers="model.layers",
        interleaved_heads={"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"},
        rope_divisors="rope_freqs.weight",  # of Llama 3.1 and later
        write_config=gguf_metadata,
        write_divisors=gguf_divisors,
    ),
)
