"""Cuts a graph into segments, between which few values cross."""

from __future__ import annotations

from dataclasses import dataclass

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
    segments: list[Segment] = []
    start = 0
    for end, values in enumerate(alive, 1):
        last = end == len(nodes)
        linears = any(map(is_float_linear, nodes[start:end]))
        if not last and not (linears and _count(values, tables) <= fewest):
            continue
        takes = tuple(alive[start - 1]) if start else ()
        segments.append(Segment(tuple(nodes[start:end]), takes, tuple(graph.outputs) if last else tuple(values)))
        start = end
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
