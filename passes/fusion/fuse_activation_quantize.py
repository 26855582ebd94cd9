"""An activation function's result leaves its kernel quantized."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from compiler.ir.build import make_node
from compiler.ir.ops import attributes_of
from passes.base import Replacement, RewritePass, other_readers

_FUSED = {"Gelu": "GeluQuantize", "SwiGLU": "SwiGLUQuantize"}


@dataclass(frozen=True)
class FuseActivationQuantize(RewritePass[tuple[ir.Node, ir.Node]]):
    """xq, xs = QuantizeTokens(Gelu(x))   becomes   xq, xs = GeluQuantize(x);   SwiGLU(gate, up) likewise; the bits are kept

    Refuses when something else reads the float32 result.
    """

    def pattern(self, node: ir.Node) -> tuple[ir.Node, ir.Node] | None:
        x = node.inputs[0] if node.op_type == "QuantizeTokens" else None
        activation = None if x is None else x.producer()
        return (activation, node) if activation is not None and activation.op_type in _FUSED else None

    def check(self, match: tuple[ir.Node, ir.Node]) -> str:
        activation, quantize = match
        readers = other_readers(activation.outputs[0], quantize)
        return f"the float32 result of {activation.name} is also read by {', '.join(readers)}" if readers else ""

    def rewrite(self, match: tuple[ir.Node, ir.Node], graph: ir.Graph) -> Replacement:
        activation, quantize = match
        node = make_node(
            _FUSED[activation.op_type], activation.inputs, str(activation.name), attributes=attributes_of(quantize)
        )
        return Replacement(match, [node], dict(zip(quantize.outputs, node.outputs, strict=True)))
