"""Translates a graph of the `belle` domain into standard ONNX, with ops of com.microsoft where ONNX Runtime gains by them.

Activations are [B, S, width] in place of [T, width]. Linears multiply by weights [inputs, outputs], as MatMul takes them.
The integers of weights and their scales are those of the graph. Every node computes a token from this token and the cache
alone, so that the bits of a token do not depend on what else is in the step.
"""

from __future__ import annotations

import onnx_ir as ir

from belle_compile.compiler.backends.onnx.cpu import CpuKernels
from belle_compile.compiler.backends.onnx.graph import OnnxModel
from belle_compile.compiler.backends.onnx.interface import Interface
from belle_compile.compiler.backends.onnx.kernels import Kernels, RuntimeTranslation
from belle_compile.compiler.backends.onnx.rules import RULES


def translate(source: ir.Model, interface: Interface, kernels: Kernels | None = None) -> OnnxModel:
    """The ONNX model of a verified graph of one rank, with `kernels` of the CPU by default; raises CompileError for an op that
    has no translation."""
    kernels = kernels or CpuKernels()
    return RuntimeTranslation(source, interface, kernels).run(RULES | dict(kernels.rules))
