"""The translation for the CUDA execution provider: MatMulInteger with int8 activations, and attention in float16.

MatMulIntegerToFloat and DynamicQuantizeLinear have no CUDA kernels. MatMulInteger takes int8 for both operands, and its sums
are exact, whatever kernel cuBLAS chooses for a number of rows. Weights of 8 bits with float16 activations (MatMulNBits) would
need fewer kernels, but their sums are floats, which that choice changes. The integer sums become float32, and float32 is also
what the residual stream is and what activations are quantized from: no kernel is spent on a cast. Queries, keys and values are
float16, because GroupQueryAttention has kernels for this type and for bfloat16 only.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_ir as ir

from belle_compile.compiler.backends.base import Array
from belle_compile.compiler.backends.onnx.graph import OnnxGraph, StoredTensor
from belle_compile.compiler.backends.onnx.interface import ServingInterface, StepValues
from belle_compile.compiler.backends.onnx.kernels import Kernels
from belle_compile.compiler.backends.onnx.translation import Attributes, Translation, tensor_of, width_of
from belle_compile.compiler.ir.meanings import block_hadamard as block_hadamard_meaning


class CudaKernels(Kernels):
    """Integers of activations are int8. Without copying the weight in every step, MatMulInteger takes rows of a multiple of 32
    bytes only."""

    weight_floats = kv_floats = "float16"
    column_unit = 32
    signs_in_scales = False  # the matrix of a rotation has them

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.rules = {"BlockHadamard": block_hadamard}

    def integers(self, graph: OnnxGraph, x: ir.Value, name: str, steps: int = 1) -> ir.Value:
        step, zero = graph.constant(f"step.1/{steps}", 1 / steps, "float32"), graph.constant("zero.int8", 0, "int8")
        return graph.op("QuantizeLinear", x, step, zero, name=name)

    def integer_product(
        self, graph: OnnxGraph, integers: ir.Value, weight: ir.Value, scales: ir.Value, outputs: int, name: str
    ) -> ir.Value:
        sums = graph.op("MatMulInteger", integers, weight, name=f"{name}.sums")
        if outputs % self.column_unit:
            ends = (graph.constant(f"slice.{end}", [end], "int64") for end in (0, outputs))
            last = graph.constant("last_axis", [-1], "int64")
            sums = graph.op("Slice", sums, *ends, last, name=f"{name}.sums.cut")
        floats = graph.op("Cast", sums, name=f"{name}.sums.float32", to=int(ir.DataType.FLOAT))
        return graph.op("Mul", floats, scales, name=name)

    def alibi(self, t: Translation, slopes: ir.Value, heads: int) -> ir.Value:
        """[B, heads, S, capacity]: slope * (position of the key - that of the token). The difference keeps numbers small where
        they count, so that float16 represents them well."""
        name, graph = f"{slopes.name}.bias", t.graph
        keys = graph.constant(f"{name}.keys", np.arange(t.positions), "int32")
        queries = t.interface.token_positions(graph, t.step)
        column = graph.op("Unsqueeze", queries, graph.constant("axes.1.3", [1, 3], "int64"), name=f"{name}.queries")
        apart = graph.op("Sub", keys, column, name=f"{name}.distance")
        distance = graph.op("Cast", apart, name=f"{name}.distance.float32", to=int(ir.DataType.FLOAT))
        added = graph.op("Mul", t.stored(tensor_of(slopes), dims=(heads, 1, 1)), distance, name=f"{name}.float32")
        return graph.op("Cast", added, name=name, to=int(ir.DataType.FLOAT16))


def block_hadamard(t: Translation, node: ir.Node, attributes: Attributes) -> None:
    """One product with the whole matrix of a block. Two with small matrices would add less, but the second one consists of many
    products, whose addresses ONNX Runtime copies from the host in every step."""
    x, name, block, graph = node.inputs[0], str(node.outputs[0].name), attributes["block"], t.graph
    matrix = graph.weight(StoredTensor(f"hadamard.{block}", "float32", (block, block), partial(_rotation, block), name))
    shape = graph.constant(f"hadamard.shape.{width_of(x)}.{block}", [0, 0, -1, block], "int64")
    blocks = graph.op("Reshape", t.value(x), shape, name=f"{name}.blocks")
    rotated = graph.op("MatMul", blocks, matrix, name=f"{name}.rotated")
    flat = graph.constant("rows.flat", [0, 0, -1], "int64")
    t.values[node.outputs[0]] = graph.op("Reshape", rotated, flat, name=name)


def _rotation(block: int) -> Array:
    """float32 [block, block]: what a block of channels is multiplied with."""
    return block_hadamard_meaning(np.eye(block, dtype=np.float32), block=block)


class CudaInterface(ServingInterface):
    """The inputs of `ServingInterface`, but total_length is a constant: the number of positions in the cache. From it ONNX
    Runtime chooses how attention is divided, so that the step's longest sequence must not decide it. The positions of tokens
    are an input `positions` [B, S] where nodes need them: shapes, from which they could be computed, are not on the GPU."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity

    def total(self, graph: OnnxGraph) -> ir.Value:
        return graph.constant("total_length", self._capacity, "int32")

    def token_positions(self, graph: OnnxGraph, step: StepValues) -> ir.Value:
        return graph.shared_input("positions", "int32", ("B", "S"))
