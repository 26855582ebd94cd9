"""BLOOM: LayerNorm, ALiBi, fused query_key_value, GELU; checked against Transformers' modeling_bloom.py."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from belle_compile.compiler.families.config import MOST_LAYERS, Keys, Reader
from belle_compile.compiler.families.family import Family
from belle_compile.compiler.families.gguf import GgufHeader, GgufLayout
from belle_compile.compiler.families.layers import Layers
from belle_compile.compiler.families.model_config import ModelConfig
from belle_compile.compiler.families.release import Release
from belle_compile.compiler.ir.ops import attributes_of

if TYPE_CHECKING:
    pass

DEFAULT_MAX_POSITION = 2048  # BLOOM's training length; ALiBi sets no limit of its own

EMBEDDING = "word_embeddings"
KEYS = Keys(
    used=frozenset(
        """vocab_size hidden_size n_embed n_layer num_hidden_layers n_head num_attention_heads layer_norm_epsilon
        apply_residual_connection_post_layernorm tie_word_embeddings seq_length n_inner slow_but_exact pretraining_tp
        """.split()
    ),
    # offset_alibi shifts all scores of a head by the same number, which softmax cancels; the others choose Megatron's kernels.
    harmless=frozenset(
        """offset_alibi attention_softmax_in_fp32 masked_softmax_fusion bias_dropout_fusion skip_bias_add skip_bias_add_qkv
        """.split()
    ),
    fixed={
        "hidden_act": ("gelu", "gelu_new", "gelu_pytorch_tanh"),
        "head_dim": (),
        "alibi": (True,),
        "multi_query": (False,),
        "position_embedding_type": ("alibi",),
    },
)


@dataclass(frozen=True, kw_only=True)
class BloomConfig(ModelConfig):
    """The configuration of a BLOOM model, from config.json."""

    residual_after_norm: bool  # residual connections start after the norms, not before them


def read_config(config: Mapping[str, Any]) -> BloomConfig:
    """Read config.json; raises CompileError for what the graph would not compute."""
    KEYS.check(config)
    read = Reader(config)
    hidden, heads = read.integer("hidden_size", "n_embed"), read.integer("n_head", "num_attention_heads")
    if hidden % heads:
        raise read.error("n_head", str(heads), f"a divisor of the hidden size, {hidden}")
    if (inner := read.get("n_inner")) not in (None, 4 * hidden):
        raise read.error("n_inner", repr(inner), f"no value, or {4 * hidden}, four times the hidden size")
    # Tensor-parallel training alone changes nothing. With slow_but_exact too, Transformers adds up the slices of that training
    # and leaves out the biases of both output projections; no release is meant to run that way.
    if read.flag("slow_but_exact", default=False) and read.integer("pretraining_tp", default=1) > 1:
        raise read.error("slow_but_exact", "true with pretraining_tp > 1", "false", "set it to false in config.json")
    return BloomConfig(
        vocab_size=read.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_layers=read.integer("n_layer", "num_hidden_layers", most=MOST_LAYERS),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        max_position=read.integer("seq_length", default=DEFAULT_MAX_POSITION),
        epsilon=read.number("layer_norm_epsilon", default=1e-5),
        tied_head=read.flag("tie_word_embeddings", default=True),
        residual_after_norm=read.flag("apply_residual_connection_post_layernorm", default=False),
    )


def build(layers: Layers, config: BloomConfig) -> ir.Value:
    """Append the whole model to the graph; returns the logits [R, vocabulary]."""
    b, hidden, epsilon = layers.builder, config.hidden_size, config.epsilon
    table, head = layers.embedding_and_head(EMBEDDING, (config.vocab_size, hidden), tied=config.tied_head)
    slopes = b.weight("alibi_slopes", alibi_slopes(config.num_heads))
    x = b.op("Gather", table, b.inputs.token_ids, name=EMBEDDING, axis=0)
    x = layers.layer_norm(x, "word_embeddings_layernorm", hidden, epsilon)
    for layer in range(config.num_layers):
        x = _block(layers, config, x, slopes, layer)
    x = b.op("Gather", x, b.inputs.logit_rows, name="rows", axis=0)
    x = layers.layer_norm(x, "ln_f", hidden, epsilon)
    return b.op("Gemm", x, head, name="lm_head", transB=1)


def _block(layers: Layers, config: BloomConfig, x: ir.Value, slopes: ir.Value, layer: int) -> ir.Value:
    b, prefix, hidden, heads, head_dim = layers.builder, f"h.{layer}", config.hidden_size, config.num_heads, config.head_dim
    normed = layers.layer_norm(x, f"{prefix}.input_layernorm", hidden, config.epsilon)
    residual = normed if config.residual_after_norm else x

    order = order_of_parts(heads, head_dim)
    qkv = layers.linear(normed, f"{prefix}.self_attention.query_key_value", (3 * hidden, hidden), bias=True, order=order)
    q, k, v = b.split(qkv, [hidden, hidden, hidden], f"{prefix}.self_attention.qkv")
    step = b.inputs
    attended = b.op(
        "Attention",
        q,
        k,
        v,
        step.positions,
        step.sequences,
        step.block_table,
        None,
        slopes,
        name=f"{prefix}.self_attention",
        layer=layer,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        scale=1 / math.sqrt(head_dim),
    )
    attended = layers.linear(attended, f"{prefix}.self_attention.dense", (hidden, hidden), bias=True)
    x = b.op("Add", attended, residual, name=f"{prefix}.self_attention.residual")
    normed = layers.layer_norm(x, f"{prefix}.post_attention_layernorm", hidden, config.epsilon)
    residual = normed if config.residual_after_norm else x
    inner = layers.linear(normed, f"{prefix}.mlp.dense_h_to_4h", (4 * hidden, hidden), bias=True)
    inner = b.op("Gelu", inner, name=f"{prefix}.mlp.gelu", approximate="tanh")
    outer = layers.linear(inner, f"{prefix}.mlp.dense_4h_to_h", (hidden, 4 * hidden), bias=True)
    return b.op("Add", outer, residual, name=f"{prefix}.mlp.residual")


def order_of_parts(num_heads: int, head_dim: int) -> npt.NDArray[np.intp]:
    """The rows of query_key_value in the order [all q; all k; all v]; the file has q, k and v of one head after another."""
    stored = np.arange(num_heads * 3 * head_dim).reshape(num_heads, 3, head_dim)
    order: npt.NDArray[np.intp] = stored.transpose(1, 0, 2).reshape(-1)
    return order


def alibi_slopes(num_heads: int) -> npt.NDArray[np.float32]:
    """Slopes of ALiBi (https://arxiv.org/abs/2108.12409), float32 [num_heads], as `_get_alibi_slopes` of modeling_bloom.py.

    For n heads, n a power of two, they are the powers 1 to n of 2^(-8/n). For another number of heads, they are the slopes of
    the next lower power of two, followed by every second slope of the next higher one.
    """
    lower = 2 ** int(math.log2(num_heads))
    slopes = _geometric(lower, np.arange(1, lower + 1))
    extra = _geometric(2 * lower, np.arange(1, 2 * (num_heads - lower), 2))
    return np.concatenate([slopes, extra]).astype(np.float32)


def _geometric(power_of_two: int, exponents: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    base = np.float32(2.0 ** -(8.0 / power_of_two))  # rounded as in Transformers
    slopes: npt.NDArray[np.float64] = np.power(np.float64(base), exponents)
    return slopes


def gguf_config(header: GgufHeader) -> dict[str, Any]:
    """config.json from the metadata of a GGUF file, in the keys of Transformers' BloomConfig."""
    heads, hidden = header.count("attention.head_count"), header.count("embedding_length")
    return {
        "hidden_size": hidden,
        "n_inner": header.number("feed_forward_length", 4 * hidden),
        "n_layer": header.number("block_count"),
        "n_head": heads,
        "vocab_size": header.vocabulary("token_embd.weight"),
        "layer_norm_epsilon": header.number("attention.layer_norm_epsilon"),
        "tie_word_embeddings": "output.weight" not in header.shapes,
        # context_length is not read: llama.cpp's converter writes the hidden size there where config.json has no seq_length.
    }


def config_of_graph(graph: ir.Graph, dimensions: Mapping[str, int]) -> dict[str, Any]:
    """config.json of the graph of an engine, in the keys of Transformers' BloomConfig."""
    norm = next(node for node in graph if node.op_type == "LayerNormalization")
    adds = [node for node in graph if node.op_type == "Add"]
    sources = [value.producer() for value in adds[0].inputs if value is not None]
    return {
        "vocab_size": dimensions["vocab_size"],
        "hidden_size": dimensions["hidden_size"],
        "n_layer": dimensions["num_layers"],
        "n_head": dimensions["num_heads"],
        "seq_length": dimensions["max_position"],
        "layer_norm_epsilon": attributes_of(norm)["epsilon"],
        "apply_residual_connection_post_layernorm": any(
            source is not None and str(source.name).endswith("input_layernorm") for source in sources
        ),
    }


def gguf_metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of a GGUF file, as llama.cpp's converter writes it, from config.json."""
    read = read_config(config)
    if read.residual_after_norm:
        found, expected = "true", "false, which is the only graph that llama.cpp has"
        raise Reader(config).error("apply_residual_connection_post_layernorm", found, expected, "use another --format")
    return {
        "context_length": read.max_position,
        "embedding_length": read.hidden_size,
        "feed_forward_length": read.intermediate_size,
        "block_count": read.num_layers,
        "attention.head_count": read.num_heads,
        "attention.head_count_kv": read.num_heads,
        "attention.layer_norm_epsilon": read.epsilon,
    }


def release_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with the present names of what old releases call n_embed and num_attention_heads."""
    read = read_config(config)
    named = {
        "hidden_size": read.hidden_size,
        "n_layer": read.num_layers,
        "n_head": read.num_heads,
        "vocab_size": read.vocab_size,
    }
    old = ("n_embed", "n_inner", "num_hidden_layers", "num_attention_heads")
    return {key: value for key, value in config.items() if key not in old} | named


GGUF_MODULES = {
    "token_embd": EMBEDDING,
    "token_embd_norm": "word_embeddings_layernorm",
    "output_norm": "ln_f",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attention.query_key_value",
    "attn_output": "self_attention.dense",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}

FAMILY = Family(
    name="bloom",
    title="BLOOM",
    architectures=("BloomForCausalLM", "BloomModel"),
    renames=((r"^transformer\.", ""),),  # BloomForCausalLM has this prefix, BloomModel and some releases do not
    read_config=read_config,
    build=build,
    embedding=EMBEDDING,
    keys=KEYS,
    template="belle-bloom",
    release=Release(
        norm="LayerNormalization",
        prefix="transformer.",
        grouped=("self_attention.query_key_value",),
        config=release_config,
        config_of_graph=config_of_graph,
        tied_only={"compressed-tensors": "vLLM's BLOOM loads no head of its own"},
    ),
    gguf=GgufLayout(
        architectures=("bloom",),
        read_config=gguf_config,
        modules=GGUF_MODULES,
        layers="h",
        separated_heads={"attn_qkv": "n_head"},
        write_config=gguf_metadata,
    ),
)
