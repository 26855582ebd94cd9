"""Sums of integer products are scaled in the kernel that computes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from belle_compile.compiler.ir.build import make_node
from belle_compile.compiler.ir.ops import operand, spec_of
from belle_compile.compiler.ir.signature import Role
from belle_compile.passes.base import Phase, Replacement, RewritePass, other_readers


@dataclass(frozen=True)
class FuseDequantize(RewritePass[tuple[ir.Node, ir.Node]]):
    """y = Dequantize(IntegerLinear(xq, wq), xs, ws, b)   becomes   y = QuantizedLinear(xq, xs, wq, ws, b)

    Refuses where something else reads the sums. Run it after QuantizeLinears.
    """

    phase: ClassVar[Phase] = Phase.FUSION

    def pattern(self, node: ir.Node) -> tuple[ir.Node, ir.Node] | None:
        accumulator = operand(node, Role.ACCUMULATOR)
        multiply = None if accumulator is None else accumulator.producer()
        return (multiply, node) if multiply is not None and spec_of(multiply).is_linear else None

    def check(self, match: tuple[ir.Node, ir.Node]) -> str:
        multiply, scale = match
        readers = other_readers(multiply.outputs[0], scale)
        return f"its accumulator is also read by {', '.join(readers)}" if readers else ""

    def rewrite(self, match: tuple[ir.Node, ir.Node], graph: ir.Graph) -> Replacement:
        multiply, scale = match
        xq, wq = (operand(multiply, role) for role in (Role.ACTIVATION, Role.WEIGHT))
        xs, ws, bias = (operand(scale, role) for role in (Role.TOKEN_SCALE, Role.SCALE, Role.BIAS))
        node = make_node("QuantizedLinear", [xq, xs, wq, ws, bias], str(scale.name))
        return Replacement(match, [node], {scale.outputs[0]: node.outputs[0]})
