"""A norm's result is quantized in the kernel that computes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from belle_compile.compiler.ir.build import make_node
from belle_compile.compiler.ir.ops import attributes_of, operand
from belle_compile.compiler.ir.signature import Role
from belle_compile.passes.base import Phase, Replacement, RewritePass, other_readers
from belle_compile.passes.fusion.fuse_add_norm import NORMS


@dataclass(frozen=True)
class FuseNormQuantize(RewritePass[tuple[ir.Node, ir.Node]]):
    """xq, xs = QuantizeTokens(Norm(x, scale, bias))   becomes   xq, xs = NormQuantize(x, scale, bias)

    s, n = AddNorm(x, r, scale, bias); xq, xs = QuantizeTokens(n)   becomes   s, xq, xs = AddNormQuantize(x, r, scale, bias)

    Bits and a fixed step are kept. Refuses where something else reads the float32 result, as the residual stream does in BLOOM
    checkpoints with apply_residual_connection_post_layernorm. Run it after FuseAddNorm.
    """

    phase: ClassVar[Phase] = Phase.FUSION

    def pattern(self, node: ir.Node) -> tuple[ir.Node, ir.Node] | None:
        normed = node.inputs[0] if node.op_type == "QuantizeTokens" else None
        norm = None if normed is None else normed.producer()
        if norm is None or not (norm.op_type in NORMS or (norm.op_type == "AddNorm" and normed is norm.outputs[1])):
            return None
        return norm, node

    def check(self, match: tuple[ir.Node, ir.Node]) -> str:
        norm, quantize = match
        readers = other_readers(norm.outputs[-1], quantize)
        return f"the float32 result of {norm.name} is also read by {', '.join(readers)}" if readers else ""

    def rewrite(self, match: tuple[ir.Node, ir.Node], graph: ir.Graph) -> Replacement:
        norm, quantize = match
        attributes, bits = attributes_of(norm), attributes_of(quantize)
        adds = norm.op_type == "AddNorm"
        addends = norm.inputs[: 1 + adds]
        inputs = [*addends, operand(norm, Role.GAIN), operand(norm, Role.BIAS), operand(quantize, Role.STEP)]
        if not adds:
            attributes = {"kind": NORMS[norm.op_type], "epsilon": attributes["epsilon"]}
        op = "AddNormQuantize" if adds else "NormQuantize"
        node = make_node(op, inputs, str(norm.name), attributes=attributes | bits)
        old = [*norm.outputs[:-1], *quantize.outputs]
        return Replacement(match, [node], dict(zip(old, node.outputs, strict=True)))
