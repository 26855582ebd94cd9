"""Nodes that compute the same are merged (common subexpressions)."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from belle_compile.compiler.ir.ops import attributes_of, spec_of
from belle_compile.passes.base import Pass, PassResult, Phase


@dataclass(frozen=True)
class MergeDuplicates(Pass):
    """a = f(x); b = f(x); g(a, b)   becomes   a = f(x); g(a, a)

    Refuses where the second result is the graph's output, and for ops with state, because each run of these has an effect.
    """

    phase: ClassVar[Phase] = Phase.CLEANUP

    def run(self, model: ir.Model) -> PassResult:
        seen: dict[Hashable, ir.Node] = {}
        changes, refusals = 0, []
        for node in list(model.graph):
            first = seen.setdefault(_computation(node), node)
            if first is node:
                continue
            if spec_of(node).stateful:
                refusals.append(f"{node.name}: computes the same as {first.name} but {node.op_type} has state")
            elif any(value.is_graph_output() for value in node.outputs):
                refusals.append(f"{node.name}: computes the same as {first.name} but is the graph's output")
            else:
                for old, new in zip(node.outputs, first.outputs, strict=True):
                    old.replace_all_uses_with(new)
                model.graph.remove(node, safe=True)
                changes += 1
        return PassResult(changes, tuple(refusals))


def _computation(node: ir.Node) -> Hashable:
    """A key that two nodes share where they compute the same: op, inputs and attributes."""
    return node.domain, node.op_type, tuple(node.inputs), tuple(sorted(attributes_of(node).items()))
