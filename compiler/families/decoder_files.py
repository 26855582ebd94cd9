"""How files describe a decoder: GGUF metadata and tensor names, and config.json of an engine's graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import onnx_ir as ir

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.families import rope
from belle_compile.compiler.families.config import Reader
from belle_compile.compiler.families.decoder import EMBEDDING, DecoderConfig
from belle_compile.compiler.families.gguf import GgufHeader, GgufLayout
from belle_compile.compiler.families.model_config import STAGE
from belle_compile.compiler.families.release import Release
from belle_compile.compiler.ir.ops import attributes_of, operand
from belle_compile.compiler.ir.signature import Role

# Parameters of scaling by their names in Transformers, and their keys behind rope.scaling.
_GGUF_SCALING = {
    "original_max_position_embeddings": "original_context_length",
    "attention_factor": "yarn_attn_factor",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
}

ConfigOfGraph = Callable[[ir.Graph, Mapping[str, int]], dict[str, Any]]
ReadConfig = Callable[[Mapping[str, Any]], DecoderConfig]

GGUF_MODULES = {
    "token_embd": EMBEDDING,
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def gguf_layout(
    architecture: str,
    read_config: ReadConfig,
    *,
    config: Callable[[GgufHeader], dict[str, Any]] | None = None,
    metadata: Mapping[str, Any] | None = None,
    interleaved: bool = False,
    divided: bool = False,
) -> GgufLayout:
    """The GGUF files of a decoder that llama.cpp knows as `architecture`.

    `config` reads config.json from a header, and `metadata` is written beside that of all decoders. llama.cpp may pair
    neighbours of a head of q and k, so that halves are `interleaved`, and take rotary frequencies `divided` by a tensor.
    """

    def write(stated: Mapping[str, Any]) -> dict[str, Any]:
        return gguf_metadata(read_config, stated, divided=divided) | dict(metadata or {})

    return GgufLayout(
        architectures=(architecture,),
        read_config=config or gguf_dimensions,
        modules=GGUF_MODULES,
        layers="model.layers",
        interleaved_heads={"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"} if interleaved else {},
        rope_divisors="rope_freqs.weight" if divided else "",
        write_config=write,
        write_divisors=partial(gguf_divisors, read_config) if divided else lambda config: (),
    )


def own_release(config_of_graph: ConfigOfGraph) -> Release:
    """The files of a decoder that Transformers has a class for."""
    return Release(norm="RMSNormalization", config=release_config, config_of_graph=config_of_graph)


def llama_release(read_config: ReadConfig, config_of_graph: ConfigOfGraph) -> Release:
    """The files of a decoder that Transformers has no class for, and that is a LLaMA once it is a graph."""
    return Release(
        norm="RMSNormalization",
        architecture="LlamaForCausalLM",
        model_type="llama",
        config=partial(llama_config, read_config),
        config_of_graph=config_of_graph,
    )


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
        "tie_word_embeddings": "output.weight" not in header.shapes,
    } | _gguf_scaling(header)


def _gguf_scaling(header: GgufHeader) -> dict[str, Any]:
    """The keys of config.json that scale rotary embeddings."""
    linear = header.value("rope.scale_linear")  # the only key of files from before August 2023
    kind = header.value("rope.scaling.type", "linear" if linear else "none")
    attention = header.number("rope.scaling.attn_factor", 1.0)
    if kind == "none":
        return {"rope_scaling": None} | ({"rope_attention_factor": attention} if attention != 1 else {})
    if header.value("rope.scaling.yarn_ext_factor", 1.0) != 1 or header.value("rope.scaling.yarn_log_multiplier", 0.0):
        raise CompileError(
            STAGE,
            f"metadata {header.architecture}.rope.scaling.yarn_* of {header.file}",
            found="an extrapolation factor or a multiplier of logarithms",
            expected="YaRN as in Transformers",
            remedy="give the Hugging Face checkpoint",
        )
    scaling = {"rope_type": kind, "factor": header.number("rope.scaling.factor", linear or 1.0)}
    stated = {name: header.number(f"rope.scaling.{key}", math.nan) for name, key in _GGUF_SCALING.items()}
    scaling |= {name: value for name, value in stated.items() if not math.isnan(value)}
    if attention == 1:
        return {"rope_scaling": scaling}
    if kind == "yarn":  # where it multiplies what YaRN implies
        implied = scaling.get("attention_factor", rope.yarn_magnitude(scaling["factor"]))
        return {"rope_scaling": scaling | {"attention_factor": attention * implied}}
    return {"rope_scaling": scaling, "rope_attention_factor": attention}


def config_of_graph(graph: ir.Graph, dimensions: Mapping[str, int]) -> dict[str, Any]:
    """The keys of config.json that all decoders have, of the graph of an engine."""
    nodes = {str(node.name): node for node in graph}
    norm = next(node for node in graph if node.op_type == "RMSNormalization")
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
    } | rope.config_of(frequencies.const_value.numpy(), attributes_of(table), dimensions["max_position"])


def windows_of_graph(graph: ir.Graph) -> tuple[int, ...]:
    """The window of each layer, 0 where there is none."""
    return tuple(attributes_of(node)["window"] for node in graph if node.op_type == "Attention")


def has_bias(graph: ir.Graph, part: str) -> bool:
    """Whether a linear of the first layer, such as mlp.up_proj, has a bias."""
    linear = next(node for node in graph if node.name == f"model.layers.0.{part}")
    return operand(linear, Role.BIAS) is not None


def gguf_metadata(read_config: ReadConfig, config: Mapping[str, Any], *, divided: bool = False) -> dict[str, Any]:
    """The metadata of a GGUF file, as llama.cpp's converter writes it, from config.json; raises CompileError for what
    llama.cpp does not compute. `divided` says whether it divides the rotary frequencies of the architecture by a tensor."""
    read = read_config(config)
    if any(read.windows):
        expected = "no windows shorter than the longest sequence, which llama.cpp leaves out"
        raise Reader(config).error("sliding_window", str(max(read.windows)), expected, "use another --format")
    if read.rope.dynamic_factor:
        expected = "default, linear, llama3 or yarn rope parameters, which are those that llama.cpp computes"
        raise Reader(config).error("rope_scaling", "dynamic", expected, "use another --format")
    if not divided and rope.divisors(config, read.head_dim):
        expected = "default, linear or yarn rope parameters, as llama.cpp divides no frequencies of this architecture"
        raise Reader(config).error("rope_scaling", "other frequencies", expected, "use another --format")
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
    } | _scaling_metadata(rope.gguf_scaling(config, read.head_dim))


def _scaling_metadata(scaling: rope.Scaling) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    if scaling.kind != "none":
        metadata |= {"rope.scaling.type": scaling.kind, "rope.scaling.factor": scaling.factor}
    if scaling.original:
        metadata["rope.scaling.original_context_length"] = scaling.original
    if not math.isclose(scaling.attention_factor, 1, rel_tol=1e-6):
        metadata["rope.scaling.attn_factor"] = scaling.attention_factor
    return metadata


def gguf_divisors(read_config: ReadConfig, config: Mapping[str, Any]) -> list[float]:
    """The divisors of the rotary frequencies in a GGUF file: those that config.json has, or those that make llama3's."""
    return rope.divisors(config, read_config(config).head_dim)


def llama_config(read_config: ReadConfig, config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json, in the keys of Transformers' LlamaConfig, of a decoder whose graph is that of a LLaMA."""
    read = read_config(config)
    assert not any(read.windows) and not read.head_norms and read.biases.qkv == read.biases.o, "the graph of a LLaMA"
    rotary = {key: value for key, value in config.items() if key in rope.KEYS}
    return release_config(rotary) | {
        "vocab_size": read.vocab_size,
        "hidden_size": read.hidden_size,
        "intermediate_size": read.intermediate_size,
        "num_hidden_layers": read.num_layers,
        "num_attention_heads": read.num_heads,
        "num_key_value_heads": read.num_kv_heads,
        "head_dim": read.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": read.epsilon,
        "attention_bias": read.biases.qkv,
        "mlp_bias": read.biases.mlp,
    }


def release_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json as it is; raises CompileError for rotary embeddings of a GGUF file that no key of it expresses."""
    for key in ("rope_divisors", "rope_attention_factor"):
        if config.get(key) is not None:
            expected = "rope parameters in config.json"
            remedy = "give the Hugging Face checkpoint of this model"
            raise Reader(config).error(key, "what only a GGUF file has", expected, remedy)
    return {key: value for key, value in config.items() if value is not None}
