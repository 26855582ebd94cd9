"""Of a model with INT4 weights, the linears that these would harm most get INT8 weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import onnx_ir as ir

from belle_compile.compiler.ir.ops import is_float_linear
from belle_compile.passes.base import Pass, PassResult, Phase
from belle_compile.passes.quantization.groups import in_groups, leave_int8


@dataclass(frozen=True)
class UseInt8(Pass):
    """y = Gemm(x, w)   stays   y = Gemm(x, w), marked: w gets INT8 weights, where the other linears get INT4 ones in groups

    The passes after it, GptqRounding and QuantizeGroups among them, leave the `linears` to those that make INT8 weights with a
    scale for each output. Refuses names that no linear has, and the head's, which has INT8 weights in any case.
    """

    phase: ClassVar[Phase] = Phase.QUANTIZATION
    linears: tuple[str, ...]

    @property
    def options(self) -> dict[str, Any]:
        return {"linears": list(self.linears)}

    def run(self, model: ir.Model) -> PassResult:
        """Mark the linears."""
        layers = {
            str(node.name): node for node in model.graph if is_float_linear(node) and not node.outputs[0].is_graph_output()
        }
        marked = [layers[name] for name in self.linears if name in layers and in_groups(layers[name])]
        for linear in marked:
            leave_int8(linear)
        unknown = (name for name in self.linears if name not in layers)
        return PassResult(len(marked), tuple(f"{name}: no layer has this name" for name in unknown))
