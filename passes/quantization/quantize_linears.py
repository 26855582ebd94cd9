"""Linear layers, the LM head among them, multiply INT8 by INT8."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

import onnx_ir as ir

from compiler.ir.build import make_node
from passes.base import Replacement, RewritePass, is_weight
from passes.quantization.weights import quantized_weight

_MAX_INPUTS = (2**31 - 1) // 127**2  # products that an int32 accumulator holds whatever their values


@dataclass(frozen=True)
class QuantizeLinears(RewritePass[ir.Node]):
    """y = Gemm(x, w, b)   becomes   xq, xs = QuantizeTokens(x); y = Dequantize(IntegerLinear(xq, wq), xs, ws, b)

    W8A8: weights have one scale per output channel, activations one per token, found while running. Linears that read
    the same x share one QuantizeTokens; linears that read the same w share wq and ws. `keep` are glob patterns of
    names of linears that stay float32. Refuses a weight that is computed, or too wide for an int32 accumulator.
    """

    keep: tuple[str, ...] = ()

    def pattern(self, node: ir.Node) -> ir.Node | None:
        return node if node.op_type == "Gemm" and not node.domain else None

    def check(self, match: ir.Node) -> str:
        weight = match.inputs[1]
        kept = next((pattern for pattern in self.keep if fnmatchcase(str(match.name), pattern)), None)
        if kept is not None:
            return f"stays float32 because of the option keep={kept!r}"
        if weight is None or not is_weight(weight) or weight.shape is None:
            return "its weight is computed, so its scales are not known when compiling"
        inputs = weight.shape.numpy()[1]
        return f"{inputs} inputs overflow an int32 accumulator, at most {_MAX_INPUTS} fit" if inputs > _MAX_INPUTS else ""

    def rewrite(self, match: ir.Node, graph: ir.Graph) -> Replacement:
        x, weight, *bias = match.inputs
        assert x is not None and weight is not None
        quantize = next((node for node in x.consumers() if node.op_type == "QuantizeTokens"), None)
        new = []
        if quantize is None:
            quantize = make_node("QuantizeTokens", [x], f"{x.name}.quantize")
            new.append(quantize)
        xq, xs = quantize.outputs
        wq, ws = quantized_weight(weight, graph)
        multiply = make_node("IntegerLinear", [xq, wq], f"{match.name}.accumulate")
        scale = make_node("Dequantize", [multiply.outputs[0], xs, ws, *bias], str(match.name))
        return Replacement([match], [*new, multiply, scale], {match.outputs[0]: scale.outputs[0]})
