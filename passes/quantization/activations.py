"""Quantizes an activation once for all linears that read it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from belle_compile.compiler.ir.build import make_initializer, make_node
from belle_compile.compiler.ir.meanings import LIMITS

CLIP = "clip"  # key in the meta of a float32 activation: the magnitude that becomes the largest integer, for all tokens


def quantizer_of(x: ir.Value) -> ir.Node | None:
    """The QuantizeTokens that reads x; None where there is none yet."""
    return next((node for node in x.consumers() if node.op_type == "QuantizeTokens"), None)


def quantize_tokens(x: ir.Value, bits: int, graph: ir.Graph) -> tuple[ir.Node, list[ir.Node]]:
    """Return the QuantizeTokens that reads x, and the nodes that this call made (none where x had a QuantizeTokens already)."""
    known = quantizer_of(x)
    if known is not None:
        return known, []
    inputs = [x]
    if CLIP in x.meta:
        step = make_initializer(ir.tensor(np.array([x.meta[CLIP] / LIMITS[bits]], np.float32), name=f"{x.name}.step"))
        graph.register_initializer(step)
        inputs.append(step)
    node = make_node("QuantizeTokens", inputs, f"{x.name}.quantize", attributes={"bits": bits})
    return node, [node]
