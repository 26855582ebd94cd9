"""Linear layers multiply INT4 weights, which have one scale for each group of inputs, by INT8 activations."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import onnx_ir as ir

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.ir.build import make_node
from belle_compile.compiler.ir.ops import attributes_of, is_float_linear, operand
from belle_compile.compiler.ir.signature import Role
from belle_compile.passes.base import Phase, Replacement, RewritePass, is_weight
from belle_compile.passes.quantization.activations import quantize_tokens, quantizer_of
from belle_compile.passes.quantization.groups import group_bits, in_groups
from belle_compile.passes.quantization.scheme import INT4, WeightScheme
from belle_compile.passes.quantization.weights import grouped_weight


@dataclass(frozen=True)
class QuantizeGroups(RewritePass[ir.Node]):
    """y = Gemm(x, w, b)   becomes   xq, xs = QuantizeTokens(x); y = GroupQuantizedLinear(xq, xs, w.int4, w.scales, b)

    Weights are INT4, or have the 6 bits that UseMoreBits gave them, with a float16 scale for each output and group of
    `weights.group` inputs; activations are INT8 with one scale per token, computed at run time. Linears that read the same x
    share one QuantizeTokens; linears that read the same w share its integers and scales. The head, whose few weights decide
    between all words, is left to QuantizeLinears, as are linears that were given 8 bits or whose names match a glob pattern of
    `keep`. Refuses a computed weight, and an input that has 16 bits already.
    """

    phase: ClassVar[Phase] = Phase.QUANTIZATION
    keep: tuple[str, ...] = ()
    weights: WeightScheme = INT4

    def __post_init__(self) -> None:
        if not self.weights.is_grouped_int4:
            raise CompileError("quantize", "option weights of groups", found=str(self.weights), expected=str(INT4))

    @property
    def options(self) -> dict[str, Any]:
        return {"keep": list(self.keep)} | self.weights.unusual

    def pattern(self, node: ir.Node) -> ir.Node | None:
        return node if is_float_linear(node) and in_groups(node) else None

    def check(self, match: ir.Node) -> str:
        x, weight = (operand(match, role) for role in (Role.ACTIVATION, Role.WEIGHT))
        kept = next((glob for glob in self.keep if fnmatchcase(str(match.name), glob)), "")
        if kept:
            return f"gets no INT4 weights because of the option keep={kept!r}"
        if x is None or not is_weight(weight):
            return "its weight is computed, so its scales are not known when compiling"
        known = quantizer_of(x)
        return "its input has 16 bits" if known is not None and attributes_of(known)["bits"] != 8 else ""

    def rewrite(self, match: ir.Node, graph: ir.Graph) -> Replacement:
        x, weight, bias = (operand(match, role) for role in (Role.ACTIVATION, Role.WEIGHT, Role.BIAS))
        group = self.weights.group
        assert x is not None and weight is not None and group is not None
        quantize, new = quantize_tokens(x, 8, graph)
        bits = group_bits(match, self.weights)
        inputs = [*quantize.outputs, *grouped_weight(weight, group, graph, bits), bias]
        attributes = {} if group == INT4.group else {"group": group}
        attributes |= {} if bits == INT4.bits else {"integer_bits": bits}
        node = make_node("GroupQuantizedLinear", inputs, str(match.name), attributes=attributes)
        return Replacement([match], [*new, node], {match.outputs[0]: node.outputs[0]})
