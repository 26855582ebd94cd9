"""Of a model with INT4 weights, the linears that these would harm most get weights of 6 or 8 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import onnx_ir as ir

from belle_compile.compiler.ir.ops import is_float_linear
from belle_compile.passes.base import Pass, PassResult, Phase
from belle_compile.passes.quantization.groups import give_bits, group_bits
from belle_compile.passes.quantization.scheme import INT4, MoreBits


@dataclass(frozen=True)
class UseMoreBits(Pass):
    """y = Gemm(x, w)   stays   y = Gemm(x, w), marked: w gets 6 or 8 bits, where the weights of other linears get 4

    The passes after it, GptqRounding and QuantizeGroups among them, give the linears of `more_bits.int6` such weights in groups
    of inputs, and leave those of `more_bits.int8` to the passes that make INT8 weights with a scale for each output. Refuses
    names that no linear has, and the head's, which has INT8 weights in any case.
    """

    phase: ClassVar[Phase] = Phase.QUANTIZATION
    more_bits: MoreBits

    @property
    def options(self) -> dict[str, Any]:
        return {"int6": list(self.more_bits.int6), "int8": list(self.more_bits.int8)}

    def run(self, model: ir.Model) -> PassResult:
        """Mark the linears."""
        linears = (node for node in model.graph if is_float_linear(node) and not node.outputs[0].is_graph_output())
        layers = {str(node.name): node for node in linears}
        changes, refusals = 0, list[str]()
        for bits, names in ((6, self.more_bits.int6), (8, self.more_bits.int8)):
            for name in names:
                if name not in layers:
                    refusals.append(f"{name}: no layer has this name")
                elif group_bits(layers[name], INT4) != bits:
                    give_bits(layers[name], bits)
                    changes += 1
        return PassResult(changes, tuple(refusals))
