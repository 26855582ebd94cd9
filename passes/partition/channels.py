"""Which channels of each value a rank has: those of its heads around attention, and its share around the feed-forward part."""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd, lcm

import onnx_ir as ir

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.ir.ops import attributes_of, spec_of
from belle_compile.compiler.ir.signature import Role
from belle_compile.passes.partition.shares import CHANNELS, TOKENS, Range, heads, share

Ranges = tuple[Range, ...]
ACTIVATIONS = ("Gelu", "SwiGLU")
KEEPS_CHANNELS = ("BlockHadamard", "QuantizeTokens")  # ops whose output has the channels of their input
OF_HEADS = ("HeadNorm",)  # ops that treat each head of queries or keys alone


def channels_of_rank(graph: ir.Graph, rank: int, ranks: int) -> dict[ir.Value, Ranges]:
    """The ranges of channels that a rank has of each value that ranks divide; all other values are whole on every rank.

    Ranks divide the inputs and outputs of attentions and feed-forward activations, the values between these and the linears
    around them, and the logits. Raises CompileError where such a value cannot be divided.
    """
    parts: dict[ir.Value, Ranges] = {}
    for node in graph:
        source = node.inputs[0]
        if node.op_type == "Attention":
            parts.update(_attention_channels(node, rank, ranks))
        elif node.op_type in ACTIVATIONS:
            unit, remedy = _unit(node, ranks)
            channels = (share(width_of(source), unit, rank, ranks, f"channels of {node.name}", remedy),)
            parts.update({value: channels for value in (*node.inputs, *node.outputs) if value is not None})
        elif node.op_type in KEEPS_CHANNELS and source in parts:
            parts[node.outputs[0]] = parts[source]
    logits = graph.outputs[0]
    parts[logits] = (share(width_of(logits), TOKENS, rank, ranks, "tokens of the vocabulary"),)
    for node in reversed(graph):
        source = node.inputs[0] if node.inputs else None
        if source is None or not any(value in parts for value in node.outputs):
            continue
        if node.op_type == "Split":
            parts[source] = tuple(_fused_channels(node, parts))
        elif spec_of(node).scales_sums or node.op_type in OF_HEADS:
            parts[source] = parts[node.outputs[0]]
    return parts


def width_of(value: ir.Value | None) -> int:
    """The number of channels of a value in the whole graph."""
    assert value is not None and value.shape is not None
    width = value.shape[-1]
    assert isinstance(width, int), "only rows are symbolic"
    return width


def _attention_channels(node: ir.Node, rank: int, ranks: int) -> dict[ir.Value, Ranges]:
    """The channels of the rank's heads in the inputs and the output of an attention."""
    options = attributes_of(node)
    head_dim = options["head_dim"]
    group = _group_behind(node)
    together = group // gcd(group, head_dim)
    query, kv = heads(options["num_heads"], options["num_kv_heads"], together, rank, ranks)
    q, k, v = node.inputs[:3]
    assert q is not None and k is not None and v is not None
    queries, keys = (((start * head_dim, stop * head_dim),) for start, stop in (query, kv))
    return {q: queries, k: keys, v: keys, node.outputs[0]: queries}


def _unit(activation: ir.Node, ranks: int) -> tuple[int, str]:
    """The number of channels of a feed-forward activation that stay together, and a remedy where ranks outnumber such units.

    Whole blocks of the activation's rotation stay together, and whole groups of the inputs of the linear after it.
    """
    rotation = [reader for reader in activation.outputs[0].consumers() if reader.op_type == "BlockHadamard"]
    block = attributes_of(rotation[0])["block"] if rotation else CHANNELS
    least = lcm(_group_behind(activation), CHANNELS)
    enough = width_of(activation.outputs[0]) // least >= ranks
    remedy = "from the checkpoint for these, with smaller blocks of its rotation" if rotation and enough else ""
    return lcm(block, least), remedy


def _group_behind(node: ir.Node) -> int:
    """The number of inputs that share a scale in the weights of the linears after a node; 1 where each output has one scale."""
    groups = [1]
    for reader in node.outputs[0].consumers():
        if spec_of(reader).index(Role.GROUP_SCALE) is not None:
            groups.append(attributes_of(reader)["group"])
        elif reader.op_type in KEEPS_CHANNELS:
            groups.append(_group_behind(reader))
    return lcm(*groups)


def _fused_channels(split: ir.Node, parts: dict[ir.Value, Ranges]) -> Iterator[Range]:
    """The channels that a rank has of a value that is split, given those of its parts."""
    start = 0
    for value in split.outputs:
        if value not in parts:
            expected = "queries, keys and values alone"
            raise CompileError(
                "partition", f"part {value.name}", node=str(split.name), found="other readers", expected=expected
            )
        yield from ((start + low, start + high) for low, high in parts[value])
        start += width_of(value)
