"""Lowering to kernel calls of the CPU backend."""

from __future__ import annotations

import onnx_ir as ir

from belle_compile.compiler.backends.program.kernel import round_up
from belle_compile.compiler.backends.program.lower import lower_graph
from belle_compile.compiler.backends.program.lowering import (
    VECTOR_ALIGNMENT,
    Kernels,
    LoweredGraph,
    Lowering,
    Operand,
    StepSizes,
    pack_vector,
)
from belle_compile.compiler.backends.tvm import packing
from belle_compile.compiler.backends.tvm.kernels.activation import Activation
from belle_compile.compiler.backends.tvm.kernels.append_kv import AppendKV
from belle_compile.compiler.backends.tvm.kernels.attention import Attention
from belle_compile.compiler.backends.tvm.kernels.base import Kernel, rows_apart
from belle_compile.compiler.backends.tvm.kernels.embedding import FloatEmbedding, QuantizedEmbedding
from belle_compile.compiler.backends.tvm.kernels.float_linear import FloatLinear
from belle_compile.compiler.backends.tvm.kernels.group_linear import GroupLinear
from belle_compile.compiler.backends.tvm.kernels.hadamard import BlockHadamard
from belle_compile.compiler.backends.tvm.kernels.low_rank import LowRank
from belle_compile.compiler.backends.tvm.kernels.norm import HeadNorm, Norm
from belle_compile.compiler.backends.tvm.kernels.quantize import QuantizeTokens
from belle_compile.compiler.backends.tvm.kernels.quantized_linear import QuantizedLinear
from belle_compile.compiler.backends.tvm.kernels.rotary import RotaryTable
from belle_compile.compiler.backends.tvm.kernels.rows import Add, GatherRows
from belle_compile.runtime.program import Weight


class TvmLowering(Lowering):
    """Lowering for CPUs. Weights are packed in panels; quantized activations are stored as uint8, int8 + 128."""

    backend = "tvm"
    byte = Kernel.byte
    sizes = StepSizes(tokens=512, rows=64, sequences=64)
    half = "bfloat16"
    kernels = Kernels(
        FloatLinear, QuantizedLinear, FloatEmbedding, QuantizedEmbedding, Norm, HeadNorm, Activation, BlockHadamard,
        QuantizeTokens, RotaryTable, Add, GatherRows, AppendKV, (("always", Attention),), GroupLinear, LowRank,
    )  # fmt: skip

    def row_stride(self, width: int, dtype: str) -> int:
        return rows_apart(width, 1 if dtype == self.byte else 4).stride

    def float_matrix(self, value: ir.Value | None) -> Weight:
        tensor, name, outputs, inputs = self.matrix(value)
        shape = packing.float_panels_shape(outputs, inputs)
        return self.weight(name, "float32", shape, lambda: packing.pack_float(tensor.numpy()))

    def int8_matrix(self, value: ir.Value | None) -> Weight:
        tensor, name, outputs, inputs = self.matrix(value)
        shape = packing.int8_panels_shape(outputs, inputs)
        return self.weight(name, "int8", shape, lambda: packing.pack_int8(tensor.numpy()))

    def int8_linear(self, weight: ir.Value | None, scale: ir.Value | None) -> list[Operand]:
        """The weight, its scales, and the int32 [outputs] that activations of int8 + 128 add to the sums."""
        tensor, name, outputs, _ = self.matrix(weight)
        correction = self.weight(
            f"{name}.correction", "int32", (round_up(outputs, VECTOR_ALIGNMENT),),
            lambda: pack_vector(packing.correction(tensor.numpy())),
        )  # fmt: skip
        return [self.int8_matrix(weight), self.vector(scale), correction]

    def group_linear(self, weight: ir.Value | None, scale: ir.Value | None, bits: int) -> list[Operand]:
        """The weight of 4 or 6 bits in panels, and its float16 scales [outputs, groups] in panels."""
        tensor, name, outputs, inputs = self.matrix(weight)
        shape_of, pack = (
            (packing.int4_panels_shape, packing.pack_int4) if bits == 4 else (packing.int6_panels_shape, packing.pack_int6)
        )
        packed = self.weight(name, "uint8", shape_of(outputs, inputs), lambda: pack(tensor.numpy().astype("int8")))
        scales, scales_name, rows, groups = self.matrix(scale)
        panels = packing.group_scales_shape(rows, groups)
        return [packed, self.weight(scales_name, "float16", panels, lambda: packing.pack_group_scales(scales.numpy()))]


def lower(model: ir.Model, calls_before_fusion: int, kv_cache: str = "auto") -> LoweredGraph:
    """Lower a graph with the kernels of this backend, see `lower_graph`."""
    return lower_graph(TvmLowering, model, calls_before_fusion, kv_cache)
