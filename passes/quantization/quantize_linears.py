"""Linear layers, the LM head among them, multiply INT8 weights by activations of 8 or 16 bits."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

import onnx_ir as ir

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.ir.build import make_node
from belle_compile.compiler.ir.meanings import MAX_INPUTS
from belle_compile.compiler.ir.ops import attributes_of
from belle_compile.passes.base import PassResult, Phase, Replacement, RewritePass, is_weight
from belle_compile.passes.quantization.activations import quantize_tokens, quantizer_of
from belle_compile.passes.quantization.weights import quantized_weight


@dataclass(frozen=True)
class QuantizeLinears(RewritePass[ir.Node]):
    """y = Gemm(x, w, b)   becomes   xq, xs = QuantizeTokens(x); y = Dequantize(IntegerLinear(xq, wq), xs, ws, b)

    Weights are INT8 with one scale per output channel. Activations have `activation_bits`, 8 or 16, and one scale per
    token, found while running. Linears that read the same x share one QuantizeTokens; linears that read the same w share
    wq and ws. `keep` are glob patterns of names of linears that stay float32, `wide` of those whose input gets 16 bits;
    the others that read the same input read these. Refuses a weight that is computed, or too wide for an int32
    accumulator, and a pattern of `wide` that names no linear.
    """

    phase: ClassVar[Phase] = Phase.QUANTIZATION
    keep: tuple[str, ...] = ()
    activation_bits: int = 8
    wide: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.activation_bits not in MAX_INPUTS:
            expected = " or ".join(map(str, MAX_INPUTS))
            raise CompileError("quantize", "option activation_bits", found=str(self.activation_bits), expected=expected)

    def run(self, model: ir.Model) -> PassResult:
        """Rewrite what matches; patterns of `wide` without a linear are told with the refusals."""
        names = [str(node.name) for node in model.graph if node.op_type in ("Gemm", "Dequantize")]
        idle = [glob for glob in self.wide if not any(fnmatchcase(name, glob) for name in names)]
        result = super().run(model)
        return PassResult(result.changes, (*result.refusals, *(f"wide={glob!r}: no linear has such a name" for glob in idle)))

    def pattern(self, node: ir.Node) -> ir.Node | None:
        return node if node.op_type == "Gemm" and not node.domain else None

    def check(self, match: ir.Node) -> str:
        x, weight = match.inputs[:2]
        kept = _first(self.keep, match)
        if kept:
            return f"stays float32 because of the option keep={kept!r}"
        if x is None or weight is None or not is_weight(weight) or weight.shape is None:
            return "its weight is computed, so its scales are not known when compiling"
        inputs, most = weight.shape.numpy()[1], MAX_INPUTS[self._bits(x)]
        return f"{inputs} inputs overflow an int32 accumulator, at most {most} fit" if inputs > most else ""

    def rewrite(self, match: ir.Node, graph: ir.Graph) -> Replacement:
        x, weight, *bias = match.inputs
        assert x is not None and weight is not None
        quantize, new = quantize_tokens(x, self._bits(x), graph)
        xq, xs = quantize.outputs
        wq, ws = quantized_weight(weight, graph)
        multiply = make_node("IntegerLinear", [xq, wq], f"{match.name}.accumulate")
        scale = make_node("Dequantize", [multiply.outputs[0], xs, ws, *bias], str(match.name))
        return Replacement([match], [*new, multiply, scale], {match.outputs[0]: scale.outputs[0]})

    def _bits(self, x: ir.Value) -> int:
        """Bits of x for the linears that read it: those that it has, or 16 as soon as one of them is wide."""
        quantize = quantizer_of(x)
        if quantize is not None:
            return int(attributes_of(quantize)["bits"])
        linears = (node for node in x.consumers() if self.pattern(node) and not _first(self.keep, node))
        return 16 if any(_first(self.wide, linear) for linear in linears) else self.activation_bits


def _first(globs: tuple[str, ...], node: ir.Node) -> str:
    """The first pattern that the node's name matches."""
    return next((glob for glob in globs if fnmatchcase(str(node.name), glob)), "")
