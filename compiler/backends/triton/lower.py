"""Lowering to kernel calls of the GPU backend."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from belle_compile.compiler.backends.program import kernel
from belle_compile.compiler.backends.program.kernel import View, round_up
from belle_compile.compiler.backends.program.kernels import Columns
from belle_compile.compiler.backends.program.lower import lower_graph
from belle_compile.compiler.backends.program.lowering import (
    CandidatePlaces,
    Kernels,
    LoweredGraph,
    Lowering,
    Operand,
    Place,
    Rows,
)
from belle_compile.compiler.backends.triton.kernels.activation import (
    ActivateChunks,
    Activation,
    BlockHadamard,
    QuantizeChunks,
    QuantizeTokens,
)
from belle_compile.compiler.backends.triton.kernels.attention import AttendAlone, AttendRuns
from belle_compile.compiler.backends.triton.kernels.base import STEP, Kernel
from belle_compile.compiler.backends.triton.kernels.cache import AppendKV
from belle_compile.compiler.backends.triton.kernels.candidates import CAPACITY, ChunkMaxima, Collect
from belle_compile.compiler.backends.triton.kernels.linear import FloatLinear, QuantizedLinear
from belle_compile.compiler.backends.triton.kernels.low_rank import MOST_PARTS, Shrink
from belle_compile.compiler.backends.triton.kernels.norm import HeadNorm, Norm
from belle_compile.compiler.backends.triton.kernels.rotary import RotaryTable
from belle_compile.compiler.backends.triton.kernels.rows import (
    DEPTH_ALIGNMENT,
    Add,
    FloatEmbedding,
    GatherRows,
    QuantizedEmbedding,
)
from belle_compile.runtime.program import Input, Weight, When


class TritonLowering(Lowering):
    """Lowering for GPUs. Rows of weights are padded with zeros to 64 bytes; quantized activations are int8."""

    backend = "triton"
    byte = Kernel.byte
    sizes = STEP
    half = "float16"
    kernels = Kernels(
        FloatLinear, QuantizedLinear, FloatEmbedding, QuantizedEmbedding, Norm, HeadNorm, Activation, BlockHadamard,
        QuantizeTokens, RotaryTable, Add, GatherRows, AppendKV, (("alone", AttendAlone), ("runs", AttendRuns)),
        LowRank=Shrink,
    )  # fmt: skip

    def call(self, kernel: kernel.Kernel, node: ir.Node, rows: Rows, *operands: Operand, when: When = "always") -> None:
        """Append a call of a kernel, or the calls of several that compute it: an activation in chunks of a row, or changes of
        low rank."""
        if isinstance(kernel, Activation) and kernel.chunked:
            first = ActivateChunks(kernel)
            maxima = Place(self.buffer(rows, first.chunks, "float32"), 0, first.chunks)
            *inputs, quantized, scales = operands
            super().call(first, node, rows, *inputs, maxima, quantized, scales, when=when)
            super().call(QuantizeChunks(first), node, rows, inputs[0], maxima, quantized, scales, when=when)
        elif isinstance(kernel, Shrink):
            self._low_rank(kernel, node, rows, *operands, when=when)
        else:
            super().call(kernel, node, rows, *operands, when=when)

    def _low_rank(self, kernel: Shrink, node: ir.Node, rows: Rows, *operands: Operand, when: When) -> None:
        """Append the two calls that compute changes of a few linears, as often as it takes for all of them."""
        parts = kernel.columns.parts
        before, regions, out = operands[: -len(parts) - 1], operands[-len(parts) - 1 : -1], operands[-1]
        where = before[-3:]  # the rows with adapters, and the adapters of sequences
        for first in range(0, len(parts), MOST_PARTS):
            some = slice(first, first + MOST_PARTS)
            shrink = replace(kernel, columns=Columns(parts[some]))
            sums = Place(self.buffer(rows, shrink.sums.stride, "float32"), 0, shrink.sums.stride)
            super().call(shrink, node, rows, *before, *regions[some], sums, when=when)
            super().call(shrink.expand(), node, rows, *where, *regions[some], sums, out, when=when)

    def float_matrix(self, value: ir.Value | None) -> Weight:
        return self._matrix(value, "float32")

    def int8_matrix(self, value: ir.Value | None) -> Weight:
        return self._matrix(value, "int8")

    def int8_linear(self, weight: ir.Value | None, scale: ir.Value | None) -> list[Operand]:
        return [self.int8_matrix(weight), self.vector(scale)]

    def group_linear(self, weight: ir.Value | None, scale: ir.Value | None, bits: int) -> list[Operand]:
        raise AssertionError("there is no kernel to take them")

    def finish(self, node: ir.Node, logits: Place) -> CandidatePlaces:
        """Append the calls that select the best logits of each row, so that few numbers are copied from the device."""
        view = View(logits.buffer.stride)
        maxima = ChunkMaxima(logits.width, view)
        chunk_maxima = Place(self.buffer("R", maxima.chunks, "float32"), 0, maxima.chunks)
        counts = Place(self.buffer("R", 1, "int32"), 0, 1)
        tokens, values = (Place(self.buffer("R", CAPACITY, dtype), 0, CAPACITY) for dtype in ("int32", "float32"))
        self.call(maxima, node, "R", logits, chunk_maxima, counts)
        self.call(Collect(logits.width, view), node, "R", Input("candidates"), logits, chunk_maxima, counts, tokens, values)
        return CandidatePlaces(counts, tokens, values, CAPACITY)

    def _matrix(self, value: ir.Value | None, dtype: str) -> Weight:
        tensor, name, outputs, inputs = self.matrix(value)
        size = np.dtype(dtype).itemsize
        depth = round_up(inputs * size, DEPTH_ALIGNMENT) // size
        return self.weight(name, dtype, (outputs, depth), lambda: pad_rows(tensor.numpy(), depth))


def pad_rows(matrix: npt.NDArray[np.generic], depth: int) -> npt.NDArray[np.generic]:
    """The matrix with its rows padded with zeros to `depth` elements."""
    if matrix.shape[1] == depth:
        return matrix
    padded = np.zeros((len(matrix), depth), matrix.dtype)
    padded[:, : matrix.shape[1]] = matrix
    return padded


def lower(model: ir.Model, calls_before_fusion: int, kv_cache: str = "auto") -> LoweredGraph:
    """Lower a graph with the kernels of this backend, see `lower_graph`."""
    return lower_graph(TritonLowering, model, calls_before_fusion, kv_cache, transposed_keys=False)
