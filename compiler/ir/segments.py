"""Cuts a graph into segments, between which few values cross."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import onnx_ir as ir

from belle_compile.compiler.ir.ops import is_float_linear


@dataclass(frozen=True)
class Segment:
    """Consecutive nodes of a graph. `takes` are the computed values that cross into them from earlier segments.

    `gives` are the computed values that cross into later segments; those of the last segment are the graph's outputs.
    """

    nodes: tuple[ir.Node, ...]
    takes: tuple[ir.Value, ...]
    gives: tuple[ir.Value, ...]

    @property
    def weights(self) -> tuple[ir.Value, ...]:
        """The initializers that its nodes read, each once, in order."""
        read = (value for node in self.nodes for value in node.inputs if value is not None and value.is_initializer())
        return tuple(dict.fromkeys(read))


def cut(graph: ir.Graph) -> list[Segment]:
    """Cut a graph into segments of one or more linears each.

    A cut lies where no more values are alive than at the narrowest place between two attentions, where only the residual stream
    is. Values that do not depend on embeddings (rotary tables) are not counted. A transformer layer becomes two segments: its
    attention and its feed-forward part.
    """
    nodes = list(graph)
    alive, tables = _alive(nodes), _tables(nodes)
    attentions = [i for i, node in enumerate(nodes) if node.op_type == "Attention"]
    between = alive[attentions[0] : attentions[-1]] if len(attentions) > 1 else alive[:-1]
    fewest = min((_count(values, tables) for values in between), default=0)
    ends: list[int] = []
    for end, values in enumerate(alive[:-1], 1):
        start = ends[-1] if ends else 0
        if any(map(is_float_linear, nodes[start:end])) and _count(values, tables) <= fewest:
            ends.append(end)
    return _segments(graph, nodes, alive, ends)


def cut_by_inputs(graph: ir.Graph) -> list[Segment]:
    """Cut a graph into segments whose linears read the same value each.

    Between two linears with different inputs, the cut lies where the fewest values are alive, and of several such places at the
    last. A transformer layer becomes four segments, which end before the output projection, the feed-forward and its last
    linear, and after that.
    """
    nodes = list(graph)
    alive, tables = _alive(nodes), _tables(nodes)
    linears = [i for i, node in enumerate(nodes) if is_float_linear(node)]
    ends = [
        min(range(first, second), key=lambda i: (_count(alive[i], tables), -i)) + 1
        for first, second in pairwise(linears)
        if nodes[first].inputs[0] is not nodes[second].inputs[0]
    ]
    return _segments(graph, nodes, alive, ends)


def _segments(graph: ir.Graph, nodes: list[ir.Node], alive: list[list[ir.Value]], ends: list[int]) -> list[Segment]:
    """The segments that end before the nodes with the numbers `ends`, and the last one."""
    segments: list[Segment] = []
    for start, end in pairwise([0, *ends, len(nodes)]):
        takes = alive[start - 1] if start else ()
        gives = alive[end - 1] if end < len(nodes) else graph.outputs
        segments.append(Segment(tuple(nodes[start:end]), tuple(takes), tuple(gives)))
    return segments


def _count(values: list[ir.Value], tables: set[ir.Value]) -> int:
    return sum(value not in tables for value in values)


def _tables(nodes: list[ir.Node]) -> set[ir.Value]:
    """Values that depend on no embedding, but only on positions."""
    tables: set[ir.Value] = set()
    for node in nodes:
        if node.op_type != "Gather" and all(v is None or v.producer() is None or v in tables for v in node.inputs):
            tables.update(node.outputs)
    return tables


def _alive(nodes: list[ir.Node]) -> list[list[ir.Value]]:
    """For each node, the computed values that nodes after it read."""
    last_use = {value: i for i, node in enumerate(nodes) for value in node.inputs if value is not None}
    alive: list[list[ir.Value]] = []
    current: dict[ir.Value, None] = {}
    for i, node in enumerate(nodes):
        current.update(dict.fromkeys(value for value in node.outputs if last_use.get(value, -1) > i))
        for value in node.inputs:
            if value in current and last_use[value] == i:
                del current[value]
        alive.append(list(current))
    return alive
