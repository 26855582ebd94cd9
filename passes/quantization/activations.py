"""Activations become integers once, however many linears read them."""

from __future__ import annotations

import onnx_ir as ir

from compiler.ir.build import make_node


def quantizer_of(x: ir.Value) -> ir.Node | None:
    """The QuantizeTokens that reads x, None while there is none."""
    return next((node for node in x.consumers() if node.op_type == "QuantizeTokens"), None)


def quantize_tokens(x: ir.Value, bits: int) -> tuple[ir.Node, list[ir.Node]]:
    """The QuantizeTokens of x, and the nodes that are new for it."""
    known = quantizer_of(x)
    if known is not None:
        return known, []
    node = make_node("QuantizeTokens", [x], f"{x.name}.quantize", attributes={"bits": bits})
    return node, [node]
