"""Linear layers, the LM head among them, multiply INT8 weights by activations of 8 or 16 bits."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

import onnx_ir as ir

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.ir.build import make_node
from belle_compile.compiler.ir.meanings import MAX_INPUTS
from belle_compile.compiler.ir.ops import attributes_of, is_float_linear, operand, spec_of
from belle_compile.compiler.ir.signature import Role
from belle_compile.passes.base import PassResult, Phase, Replacement, RewritePass, is_weight
from belle_compile.passes.quantization.activations import quantize_tokens, quantizer_of
from belle_compile.passes.quantization.weights import quantized_weight


@dataclass(frozen=True)
class QuantizeLinears(RewritePass[ir.Node]):
    """y = Gemm(x, w, b)   becomes   xq, xs = QuantizeTokens(x); y = Dequantize(IntegerLinear(xq, wq), xs, ws, b)

    Weights are INT8 with one scale per output channel. Activations have `activation_bits`, 8 or 16, and one scale per token,
    computed at run time. Linears that read the same x share one QuantizeTokens; linears that read the same w share wq and ws.
    Linears whose names match a glob pattern of `keep` stay float32; the input of those that match one of `wide` gets 16 bits,
    for all linears that read it. Refuses a computed weight, one with too many inputs for an int32 accumulator, and a pattern of
    `wide` that matches no linear.
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
        """Rewrite the matches, and report each pattern of `wide` that matches no linear as a refusal."""
        specs = ((spec_of(node), str(node.name)) for node in model.graph)
        names = [name for spec, name in specs if spec.is_float_linear or spec.scales_sums]
        unused = [glob for glob in self.wide if not any(fnmatchcase(name, glob) for name in names)]
        result = super().run(model)
        return PassResult(result.changes, (*result.refusals, *(f"wide={glob!r}: no linear has such a name" for glob in unused)))

    def pattern(self, node: ir.Node) -> ir.Node | None:
        return node if is_float_linear(node) else None

    def check(self, match: ir.Node) -> str:
        x, weight = (operand(match, role) for role in (Role.ACTIVATION, Role.WEIGHT))
        kept = _first(self.keep, match)
        if kept:
            return f"stays float32 because of the option keep={kept!r}"
        if x is None or weight is None or not is_weight(weight) or weight.shape is None:
            return "its weight is computed, so its scales are not known when compiling"
        inputs, most = weight.shape.numpy()[1], MAX_INPUTS[self._bits(x)]
        return f"{inputs} inputs overflow an int32 accumulator, at most {most} fit" if inputs > most else ""

    def rewrite(self, match: ir.Node, graph: ir.Graph) -> Replacement:
        x, weight, bias = (operand(match, role) for role in (Role.ACTIVATION, Role.WEIGHT, Role.BIAS))
        assert x is not None and weight is not None
        quantize, new = quantize_tokens(x, self._bits(x), graph)
        xq, xs = quantize.outputs
        wq, ws = quantized_weight(weight, graph)
        multiply = make_node("IntegerLinear", [xq, wq], f"{match.name}.accumulate")
        scale = make_node("Dequantize", [multiply.outputs[0], xs, ws, bias], str(match.name))
        return Replacement([match], [*new, multiply, scale], {match.outputs[0]: scale.outputs[0]})

    def _bits(self, x: ir.Value) -> int:
        """The bits that x gets: those of its QuantizeTokens, where it has one, else 16 where one of its linears is wide."""
        quantize = quantizer_of(x)
        if quantize is not None:
            return int(attributes_of(quantize)["bits"])
        linears = (node for node in x.consumers() if self.pattern(node) and not _first(self.keep, node))
        return 16 if any(_first(self.wide, linear) for linear in linears) else self.activation_bits


def _first(globs: tuple[str, ...], node: ir.Node) -> str:
    """The first pattern that the node's name matches; empty where it matches none."""
    return next((glob for glob in globs if fnmatchcase(str(node.name), glob)), "")
