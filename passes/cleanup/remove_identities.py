"""Identity nodes are removed: they compute nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from belle_compile.passes.base import Pass, PassResult, Phase


@dataclass(frozen=True)
class RemoveIdentities(Pass):
    """y = Identity(x); f(y)   becomes   f(x)

    Where y is the graph's output, x takes its name; refuses this where no node computes x, or x is an output itself.
    """

    phase: ClassVar[Phase] = Phase.CLEANUP

    def run(self, model: ir.Model) -> PassResult:
        changes, refusals = 0, []
        for node in list(model.graph):
            if node.op_type != "Identity" or node.domain:
                continue
            x, y = node.inputs[0], node.outputs[0]
            assert x is not None
            if y.is_graph_output() and (x.producer() is None or x.is_graph_output()):
                refusals.append(f"{node.name}: the output {y.name} must be a value of its own, {x.name} is taken")
                continue
            if y.is_graph_output():
                x.name = y.name
            y.replace_all_uses_with(x, replace_graph_outputs=True)
            model.graph.remove(node, safe=True)
            changes += 1
        return PassResult(changes, tuple(refusals))
