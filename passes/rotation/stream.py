"""Finds the residual stream of a graph, and the linears that compute what attention and activations read."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from belle_compile.compiler.ir.ops import is_float_linear, operand
from belle_compile.compiler.ir.signature import Role
from belle_compile.passes.base import is_weight, other_readers


@dataclass
class Stream:
    """The nodes around the residual stream.

    `tables` are the embeddings that start it, `writers` the linears whose outputs are added to it, `norms` the norms of it, and
    `readers` the linears that read these norms.
    """

    tables: list[ir.Node] = field(default_factory=list)
    writers: list[ir.Node] = field(default_factory=list)
    norms: list[ir.Node] = field(default_factory=list)
    readers: list[ir.Node] = field(default_factory=list)


def find_stream(graph: ir.Graph, norm: str) -> tuple[Stream, str]:
    """Find the residual stream; return it, and why the weights around it cannot absorb a linear map of it (empty: they can).

    They can where embedding tables start the stream, only linears add to it, and only nodes of the op `norm` read it, whose
    outputs only linears read.
    """
    stream, values = Stream(), set[ir.Value]()
    for node in graph:
        table = operand(node, Role.TABLE)
        if is_weight(table):
            stream.tables.append(node)
            values.add(node.outputs[0])
        elif table in values:
            values.add(node.outputs[0])
        elif node.op_type == "Add" and values & set(node.inputs):
            values.add(node.outputs[0])
            for addend in node.inputs:
                writer = addend.producer() if addend is not None else None
                if addend in values:
                    continue
                if addend is None or writer is None or not has_float_weight(writer):
                    return stream, f"{node.name}: adds something else than the output of a linear"
                if others := other_readers(addend, node):
                    return stream, f"{node.name}: what it adds is also read by {', '.join(others)}"
                stream.writers.append(writer)
        elif values & set(node.inputs):
            if node.op_type != norm:
                return stream, f"{node.name}: the residual stream is read by {node.op_type}, not by {norm}"
            readers = list(node.outputs[0].consumers())
            linears = all(map(has_float_weight, readers))
            if not linears or node.outputs[0].is_graph_output() or not is_weight(operand(node, Role.GAIN)):
                return stream, f"{node.name}: its output is read by something else than linears"
            stream.norms.append(node)
            stream.readers += readers
    if not stream.norms:
        return stream, f"there is no residual stream that {norm} reads"
    return stream, ""


def has_float_weight(node: ir.Node) -> bool:
    """Whether a node is a linear with a known float32 weight, which can absorb a change of what it reads or computes."""
    return is_float_linear(node) and is_weight(operand(node, Role.WEIGHT))


def projection_of(value: ir.Value) -> tuple[ir.Node | None, int, str]:
    """The linear that computes a value, its first output that belongs to the value, and why its weight cannot be changed.

    After a Split, the value has a part of the outputs of a fused projection. The linear is None where no linear with a known
    weight computes the value; the reason is empty where the weight may be changed.
    """
    linear, start = value.producer(), 0
    if linear is not None and linear.op_type == "Split":
        sizes, fused = operand(linear, Role.SIZES), linear.inputs[0]
        assert sizes is not None and sizes.const_value is not None and fused is not None
        start = int(sizes.const_value.numpy()[: list(linear.outputs).index(value)].sum())
        if others := other_readers(fused, linear):
            return fused.producer(), start, f"its projection is also read by {', '.join(others)}"
        linear = fused.producer()
    return (linear if linear is not None and has_float_weight(linear) else None), start, ""
