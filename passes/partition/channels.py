"""Which channels of each value a rank has: heads from attention to the linears around it, channels likewise."""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd, lcm

import onnx_ir as ir

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.ir.meanings import GROUP
from belle_compile.compiler.ir.ops import attributes_of
from belle_compile.passes.partition.shares import CHANNELS, TOKENS, Range, heads, share

Ranges = tuple[Range, ...]
ACTIVATIONS = ("Gelu", "SwiGLU")
KEEPS_CHANNELS = ("BlockHadamard", "QuantizeTokens")  # what they give has the channels that they get


def channels_of_rank(graph: ir.Graph, rank: int, ranks: int) -> dict[ir.Value, Ranges]:
    """The ranges of channels of each value that a rank has a part of; all others it has whole.

    Parts are what attention and feed-forward activation work on, what lies between them and the linears around, and the
    logits. Raises CompileError where they cannot be divided.
    """
    parts: dict[ir.Value, Ranges] = {}
    for node in graph:
        source = node.inputs[0]
        if node.op_type == "Attention":
            parts.update(_of_attention(node, rank, ranks))
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
            parts[source] = tuple(_of_fused(node, parts))
        elif node.op_type == "Dequantize":
            parts[source] = parts[node.outputs[0]]
    return parts


def width_of(value: ir.Value | None) -> int:
    """Channels of a value on one rank alone."""
    assert value is not None and value.shape is not None
    width = value.shape[-1]
    assert isinstance(width, int), "only rows are symbolic"
    return width


def _of_attention(node: ir.Node, rank: int, ranks: int) -> dict[ir.Value, Ranges]:
    options = attributes_of(node)
    head_dim = options["head_dim"]
    together = GROUP // gcd(GROUP, head_dim) if _feeds_groups(node) else 1
    query, kv = heads(options["num_heads"], options["num_kv_heads"], together, rank, ranks)
    q, k, v = node.inputs[:3]
    assert q is not None and k is not None and v is not None
    queries, keys = (((start * head_dim, stop * head_dim),) for start, stop in (query, kv))
    return {q: queries, k: keys, v: keys, node.outputs[0]: queries}


def _unit(activation: ir.Node, ranks: int) -> tuple[int, str]:
    """Channels of a feed-forward activation that stay together: whole blocks of its rotation, whole groups of weights. And
    what helps where those are too few for the ranks."""
    rotation = [reader for reader in activation.outputs[0].consumers() if reader.op_type == "BlockHadamard"]
    block = attributes_of(rotation[0])["block"] if rotation else CHANNELS
    least = GROUP if _feeds_groups(activation) else CHANNELS
    enough = width_of(activation.outputs[0]) // least >= ranks
    remedy = "from the checkpoint for these, with smaller blocks of its rotation" if rotation and enough else ""
    return lcm(block, least), remedy


def _feeds_groups(node: ir.Node) -> bool:
    """Whether the linear behind a node has weights in groups of inputs."""
    readers = node.outputs[0].consumers()
    return any(
        reader.op_type == "GroupQuantizedLinear" or (reader.op_type in KEEPS_CHANNELS and _feeds_groups(reader))
        for reader in readers
    )


def _of_fused(split: ir.Node, parts: dict[ir.Value, Ranges]) -> Iterator[Range]:
    """The channels of what is split, from those of its parts."""
    start = 0
    for value in split.outputs:
        if value not in parts:
            expected = "queries, keys and values alone"
            raise CompileError(
                "partition", f"part {value.name}", node=str(split.name), found="other readers", expected=expected
            )
        yield from ((start + low, start + high) for low, high in parts[value])
        start += width_of(value)
