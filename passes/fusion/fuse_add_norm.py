"""The residual sum and the norm after it are computed in one sweep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from belle_compile.compiler.ir.build import make_node
from belle_compile.compiler.ir.ops import attributes_of, operand
from belle_compile.compiler.ir.signature import Role
from belle_compile.passes.base import Phase, Replacement, RewritePass

NORMS = {"LayerNormalization": "layer", "RMSNormalization": "rms"}


@dataclass(frozen=True)
class FuseAddNorm(RewritePass[tuple[ir.Node, ir.Node]]):
    """s = Add(x, r); n = Norm(s, scale, bias)   becomes   s, n = AddNorm(x, r, scale, bias)

    Norm is LayerNormalization, or RMSNormalization, which has no bias. Anything may read the two results. Refuses a second norm
    of the same sum.
    """

    phase: ClassVar[Phase] = Phase.FUSION

    def pattern(self, node: ir.Node) -> tuple[ir.Node, ir.Node] | None:
        total = node.inputs[0] if node.op_type in NORMS else None
        add = None if total is None else total.producer()
        if add is None or (add.op_type != "Add" and not (add.op_type == "AddNorm" and total is add.outputs[0])):
            return None
        return add, node

    def check(self, match: tuple[ir.Node, ir.Node]) -> str:
        add, _ = match
        return f"its sum is already computed together with the norm {add.name}" if add.op_type == "AddNorm" else ""

    def rewrite(self, match: tuple[ir.Node, ir.Node], graph: ir.Graph) -> Replacement:
        add, norm = match
        attributes = {"kind": NORMS[norm.op_type], "epsilon": attributes_of(norm)["epsilon"]}
        node = make_node(
            "AddNorm", [*add.inputs, operand(norm, Role.GAIN), operand(norm, Role.BIAS)], str(norm.name), attributes=attributes
        )
        return Replacement(match, [node], {add.outputs[0]: node.outputs[0], norm.outputs[0]: node.outputs[1]})
