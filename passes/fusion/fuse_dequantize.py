"""The integer product is scaled in the kernel that computes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from belle_compile.compiler.ir.build import make_node
from belle_compile.passes.base import Phase, Replacement, RewritePass, other_readers


@dataclass(frozen=True)
class FuseDequantize(RewritePass[tuple[ir.Node, ir.Node]]):
    """y = Dequantize(IntegerLinear(xq, wq), xs, ws, b)   becomes   y = QuantizedLinear(xq, xs, wq, ws, b)

    Refuses when something else reads the integers. Needs QuantizeLinears to have run.
    """

    phase: ClassVar[Phase] = Phase.FUSION

    def pattern(self, node: ir.Node) -> tuple[ir.Node, ir.Node] | None:
        if node.op_type != "Dequantize":
            return None
        accumulator = node.inputs[0]
        multiply = None if accumulator is None else accumulator.producer()
        return (multiply, node) if multiply is not None and multiply.op_type == "IntegerLinear" else None

    def check(self, match: tuple[ir.Node, ir.Node]) -> str:
        multiply, scale = match
        readers = other_readers(multiply.outputs[0], scale)
        return f"its accumulator is also read by {', '.join(readers)}" if readers else ""

    def rewrite(self, match: tuple[ir.Node, ir.Node], graph: ir.Graph) -> Replacement:
        multiply, scale = match
        xq, wq = multiply.inputs
        _, xs, ws, *bias = scale.inputs
        node = make_node("QuantizedLinear", [xq, xs, wq, ws, *bias], str(scale.name))
        return Replacement(match, [node], {scale.outputs[0]: node.outputs[0]})
