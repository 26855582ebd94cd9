"""Finds the residual stream of a graph: who starts it, who adds to it, who reads it."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from belle_compile.passes.base import is_weight, other_readers


@dataclass
class Stream:
    """The residual stream: who starts it, who adds to it, who reads it."""

    tables: list[ir.Node] = field(default_factory=list)  # Gather from an embedding table
    writers: list[ir.Node] = field(default_factory=list)  # Gemm whose output is added
    norms: list[ir.Node] = field(default_factory=list)  # of the stream
    readers: list[ir.Node] = field(default_factory=list)  # Gemm of such a norm


def find_stream(graph: ir.Graph, norm: str) -> tuple[Stream, str]:
    """The stream, and why weights around it cannot absorb a change of it (empty when they can): it must be started by
    embedding tables, added to by linears, and read by nodes of the op `norm` that feed linears."""
    stream, values = Stream(), set[ir.Value]()
    for node in graph:
        if node.op_type == "Gather" and is_weight(node.inputs[0]):
            stream.tables.append(node)
            values.add(node.outputs[0])
        elif node.op_type == "Gather" and node.inputs[0] in values:
            values.add(node.outputs[0])
        elif node.op_type == "Add" and values & set(node.inputs):
            values.add(node.outputs[0])
            for operand in node.inputs:
                writer = operand.producer() if operand is not None else None
                if operand in values:
                    continue
                if operand is None or writer is None or writer.op_type != "Gemm" or not is_weight(writer.inputs[1]):
                    return stream, f"{node.name}: adds something else than the output of a linear"
                if others := other_readers(operand, node):
                    return stream, f"{node.name}: what it adds is also read by {', '.join(others)}"
                stream.writers.append(writer)
        elif values & set(node.inputs):
            if node.op_type != norm:
                return stream, f"{node.name}: the residual stream is read by {node.op_type}, not by {norm}"
            readers = list(node.outputs[0].consumers())
            linears = all(reader.op_type == "Gemm" and is_weight(reader.inputs[1]) for reader in readers)
            if not linears or node.outputs[0].is_graph_output() or not is_weight(node.inputs[1]):
                return stream, f"{node.name}: its output is read by something else than linears"
            stream.norms.append(node)
            stream.readers += readers
    if not stream.norms:
        return stream, f"there is no residual stream that {norm} reads"
    return stream, ""
