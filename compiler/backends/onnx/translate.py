"""Translates a graph of the `belle` domain into standard ONNX, with ops of com.microsoft where ONNX Runtime gains by them.

Activations are [B, S, width] in place of [T, width]. Linears multiply by weights [inputs, outputs], as MatMul takes them.
The integers of weights and their scales are those of the graph. Every node computes a token from this token and the cache
alone, so that the bits of a token do not depend on what else is in the step.
"""

from __future__ import annotations

import onnx_ir as ir

from belle_compile.compiler.backends.onnx.graph import OnnxModel
from belle_compile.compiler.backends.onnx.interface import Interface
from belle_compile.compiler.backends.onnx.rules import RULES
from belle_compile.compiler.backends.onnx.translation import Translation
from belle_compile.compiler.ir.ops import attributes_of


def translate(source: ir.Model, interface: Interface) -> OnnxModel:
    """The ONNX model of a verified graph of one rank; raises CompileError for an op that has no translation."""
    translation = Translation(source, interface)
    for node in source.graph:
        if node in translation.skipped:
            continue
        rule = RULES.get(node.op_type)
        if rule is None:
            raise translation.refuse(node, "no translation")
        rule(translation, node, attributes_of(node))
    return translation.finish(translation.value(source.graph.outputs[0]))
