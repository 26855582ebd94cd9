"""Cuts a graph where little crosses: the pieces of a model that need weights, one after the other."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir


@dataclass(frozen=True)
class Segment:
    """Nodes that follow each other; `takes` are values of segments before, `gives` those that later ones (or nobody: the
    graph's outputs) read."""

    nodes: tuple[ir.Node, ...]
    takes: tuple[ir.Value, ...]
    gives: tuple[ir.Value, ...]

    @property
    def weights(self) -> tuple[ir.Value, ...]:
        """Initializers that its nodes read, each once, in order."""
        read = (value for node in self.nodes for value in node.inputs if value is not None and value.is_initializer())
        return tuple(dict.fromkeys(read))


def cut(graph: ir.Graph) -> list[Segment]:
    """Segments of one or more linears each, cut where no more values are alive than at the narrowest place between two
    attentions, which is the residual stream; what no embedding has gone into (rotary tables) is not counted. A transformer
    layer becomes two, its attention and its feed-forward part."""
    nodes = list(graph)
    alive, tables = _alive(nodes), _tables(nodes)
    attentions = [i for i, node in enumerate(nodes) if node.op_type == "Attention"]
    between = alive[attentions[0] : attentions[-1]] if len(attentions) > 1 else alive[:-1]
    fewest = min((_count(values, tables) for values in between), default=0)
    segments: list[Segment] = []
    start = 0
    for end, values in enumerate(alive, 1):
        last = end == len(nodes)
        linears = any(node.op_type == "Gemm" for node in nodes[start:end])
        if not last and not (linears and _count(values, tables) <= fewest):
            continue
        takes = tuple(alive[start - 1]) if start else ()
        segments.append(Segment(tuple(nodes[start:end]), takes, tuple(graph.outputs) if last else tuple(values)))
        start = end
    return segments


def _count(values: list[ir.Value], tables: set[ir.Value]) -> int:
    return sum(value not in tables for value in values)


def _tables(nodes: list[ir.Node]) -> set[ir.Value]:
    """Values that follow from positions alone."""
    found: set[ir.Value] = set()
    for node in nodes:
        if node.op_type != "Gather" and all(v is None or v.producer() is None or v in found for v in node.inputs):
            found.update(node.outputs)
    return found


def _alive(nodes: list[ir.Node]) -> list[list[ir.Value]]:
    """After each node, the computed values that later nodes read."""
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
