"""Nodes and weights that no output depends on are removed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from belle_compile.compiler.ir.ops import spec_of
from belle_compile.passes.base import Pass, PassResult, Phase


@dataclass(frozen=True)
class RemoveUnused(Pass):
    """y = f(x, w) with y never read   becomes   nothing, and w is removed too where nothing else reads it

    Refuses to remove ops with state: they fill the cache that later steps read.
    """

    phase: ClassVar[Phase] = Phase.CLEANUP

    def run(self, model: ir.Model) -> PassResult:
        changes, refusals = 0, []
        for node in reversed(list(model.graph)):
            if any(value.uses() or value.is_graph_output() for value in node.outputs):
                continue
            if spec_of(node).stateful:
                refusals.append(f"{node.name}: its result is not used but {node.op_type} writes the cache")
                continue
            model.graph.remove(node, safe=True)
            changes += 1
        for name, value in list(model.graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del model.graph.initializers[name]
                changes += 1
        return PassResult(changes, tuple(refusals))
