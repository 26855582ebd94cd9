"""Linear layers multiply INT4 weights, with a scale for every group of inputs, by INT8 activations."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

import onnx_ir as ir

from belle_compile.compiler.ir.build import make_node
from belle_compile.compiler.ir.ops import attributes_of
from belle_compile.passes.base import Phase, Replacement, RewritePass, is_weight
from belle_compile.passes.quantization.activations import quantize_tokens, quantizer_of
from belle_compile.passes.quantization.groups import in_groups
from belle_compile.passes.quantization.weights import grouped_weight


@dataclass(frozen=True)
class QuantizeGroups(RewritePass[ir.Node]):
    """y = Gemm(x, w, b)   becomes   xq, xs = QuantizeTokens(x); y = GroupQuantizedLinear(xq, xs, w.int4, w.scales, b)

    Weights are INT4, each 128 inputs of an output with a float16 scale of their own; activations are INT8 with a scale per
    token, found while running. Linears that read the same x share one QuantizeTokens; linears that read the same w share
    both its parts. The head, whose few weights decide between all words, is left to QuantizeLinears, as is what the glob
    patterns `keep` name. Refuses a weight that is computed, and an input that has 16 bits already.
    """

    phase: ClassVar[Phase] = Phase.QUANTIZATION
    keep: tuple[str, ...] = ()

    def pattern(self, node: ir.Node) -> ir.Node | None:
        return node if node.op_type == "Gemm" and not node.domain and in_groups(node) else None

    def check(self, match: ir.Node) -> str:
        x, weight = match.inputs[:2]
        kept = next((glob for glob in self.keep if fnmatchcase(str(match.name), glob)), "")
        if kept:
            return f"gets no INT4 weights because of the option keep={kept!r}"
        if x is None or not is_weight(weight):
            return "its weight is computed, so its scales are not known when compiling"
        known = quantizer_of(x)
        return "its input has 16 bits" if known is not None and attributes_of(known)["bits"] != 8 else ""

    def rewrite(self, match: ir.Node, graph: ir.Graph) -> Replacement:
        x, weight, *bias = match.inputs
        assert x is not None and weight is not None
        quantize, new = quantize_tokens(x, 8, graph)
        node = make_node("GroupQuantizedLinear", [*quantize.outputs, *grouped_weight(weight, graph), *bias], str(match.name))
        return Replacement([match], [*new, node], {match.outputs[0]: node.outputs[0]})
