"""The result of an activation function is quantized in the kernel that computes it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import onnx_ir as ir

from belle_compile.compiler.ir.build import make_node
from belle_compile.compiler.ir.ops import attributes_of, operand
from belle_compile.compiler.ir.signature import Role
from belle_compile.passes.base import Phase, Replacement, RewritePass, other_readers

_FUSED = {"Gelu": "GeluQuantize", "SwiGLU": "SwiGLUQuantize"}


@dataclass(frozen=True)
class FuseActivationQuantize(RewritePass[tuple[ir.Node, ...]]):
    """xq, xs = QuantizeTokens(Gelu(x))   becomes   xq, xs = GeluQuantize(x);   SwiGLU(gate, up) likewise

    xq, xs = QuantizeTokens(BlockHadamard(Gelu(x)))   becomes   xq, xs = GeluQuantize(x) with the attribute hadamard

    Bits and a fixed step are kept. Refuses where something else reads a float32 result.
    """

    phase: ClassVar[Phase] = Phase.FUSION

    def pattern(self, node: ir.Node) -> tuple[ir.Node, ...] | None:
        source = _producer(node) if node.op_type == "QuantizeTokens" else None
        rotate = (source,) if source is not None and source.op_type == "BlockHadamard" else ()
        activation = _producer(rotate[0]) if rotate else source
        if activation is None or activation.op_type not in _FUSED:
            return None
        return (activation, *rotate, node)

    def check(self, match: tuple[ir.Node, ...]) -> str:
        for node, reader in pairwise(match):
            if readers := other_readers(node.outputs[0], reader):
                return f"the float32 result of {node.name} is also read by {', '.join(readers)}"
        return ""

    def rewrite(self, match: tuple[ir.Node, ...], graph: ir.Graph) -> Replacement:
        activation, *rotate, quantize = match
        attributes = attributes_of(quantize)
        if rotate:
            attributes["hadamard"] = attributes_of(rotate[0])["block"]
        inputs = [*activation.inputs, operand(quantize, Role.STEP)]
        node = make_node(_FUSED[activation.op_type], inputs, str(activation.name), attributes=attributes)
        return Replacement(match, [node], dict(zip(quantize.outputs, node.outputs, strict=True)))


def _producer(node: ir.Node) -> ir.Node | None:
    """The node that computes the first input of a node."""
    return node.inputs[0].producer() if node.inputs[0] is not None else None
