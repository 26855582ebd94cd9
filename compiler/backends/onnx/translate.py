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


def translate(source: ir.Model, interface: Interface) -> OnnxModel:
    """The ONNX model of a verified graph of one rank; raises CompileError for an op that has no translation."""
    return Translation(source, interface).run(RULES)
