"""Graphs with INT8 weights of -128. Rounding never makes one, but integers of a checkpoint reach it."""

from __future__ import annotations

import onnx_ir as ir

from belle_compile.compiler.ir.ops import operand
from belle_compile.compiler.ir.signature import Role

LOWEST, HIGHEST = -128, 127


def with_lowest_weights(model: ir.Model) -> int:
    """Give each INT8 linear of a graph a row of -128, one of 127, and -128 in every third place of all others, where magnitudes
    and sums of pairs are the largest; returns the number of linears."""
    linears = [node for node in model.graph if node.op_type == "QuantizedLinear"]
    for node in linears:
        weight = operand(node, Role.WEIGHT)
        assert weight is not None and weight.const_value is not None
        integers = weight.const_value.numpy().copy()
        integers[:, ::3] = LOWEST
        integers[0], integers[1] = LOWEST, HIGHEST
        weight.const_value = ir.tensor(integers, name=weight.name)
    return len(linears)
