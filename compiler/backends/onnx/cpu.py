"""The translation for the CPU execution provider: MatMulIntegerToFloat with uint8 activations, and attention in float32."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from belle_compile.compiler.backends.onnx.graph import MICROSOFT, OnnxGraph
from belle_compile.compiler.backends.onnx.kernels import Kernels
from belle_compile.compiler.backends.onnx.translation import Rule, Translation, tensor_of

MIDDLE = 128  # the uint8 that stands for the integer 0 of an activation: ONNX Runtime's kernels are fastest with uint8


class CpuKernels(Kernels):
    """Integers of activations are uint8 that are `MIDDLE` too large."""

    weight_floats = kv_floats = "float32"
    column_unit = 1
    capacity = None
    signs_in_scales = True

    def __init__(self) -> None:
        self.rules: Mapping[str, Rule] = {}

    def integers(self, graph: OnnxGraph, x: ir.Value, name: str, steps: int = 1) -> ir.Value:
        return graph.op("QuantizeLinear", x, graph.constant(f"step.1/{steps}", 1 / steps, "float32"), _middle(graph), name=name)

    def integer_product(
        self, graph: OnnxGraph, integers: ir.Value, weight: ir.Value, scales: ir.Value, outputs: int, name: str
    ) -> ir.Value:
        """A node of its own multiplies with the scales: ONNX Runtime copies those of MatMulIntegerToFloat one by one in each
        run, which takes 2 ns an output, a tenth of a token's time in models of 0.1 billion weights. The bits are the same."""
        one = _one(graph)
        operands = integers, weight, one, one, _middle(graph)
        product = graph.op("MatMulIntegerToFloat", *operands, name=f"{name}.unscaled", domain=MICROSOFT)
        return graph.op("Mul", product, scales, name=name)

    def alibi(self, t: Translation, slopes: ir.Value, heads: int) -> ir.Value:
        """[1, heads, S, L]: slope * position of the key."""
        name, graph = f"{slopes.name}.bias", t.graph
        zero, one = graph.constant("zero.int32", 0, "int32"), graph.constant("one.scalar", 1, "int32")
        keys = graph.op("Range", zero, t.step.total, one, name=f"{name}.keys")
        positions = graph.op("Cast", keys, name=f"{name}.positions", to=int(ir.DataType.FLOAT))
        row = graph.op("Mul", t.stored(tensor_of(slopes), dims=(1, heads, 1, 1)), positions, name=f"{name}.row")
        length = graph.op("Shape", t.step.token_ids, name=f"{name}.length", start=1)
        count = graph.op("Concat", graph.constant("ones.two", [1, 1], "int64"), length, graph.constant("one", [1], "int64"),
                         name=f"{name}.shape", axis=0)  # fmt: skip
        return graph.op("Expand", row, count, name=name)


def _one(graph: OnnxGraph) -> ir.Value:
    return graph.constant("one.float", 1, "float32")


def _middle(graph: OnnxGraph) -> ir.Value:
    return graph.constant("middle", MIDDLE, "uint8")
