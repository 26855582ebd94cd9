"""LayerNorm becomes RMSNorm: writers of the stream absorb the mean subtraction, readers the bias."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from belle_compile.compiler.ir import basis
from belle_compile.compiler.ir.build import make_initializer, make_node
from belle_compile.compiler.ir.lazy import has_rows, lazy, read_rows
from belle_compile.compiler.ir.ops import attributes_of, operand, spec_of
from belle_compile.compiler.ir.signature import Role
from belle_compile.passes.base import Pass, PassResult, Phase, Replacement, apply
from belle_compile.passes.rotation.stream import find_stream
from belle_compile.passes.rotation.weights import replace_weight

Floats = npt.NDArray[np.float32]
_ROWS = 4096  # rows computed at a time, so that temporaries stay small beside the weight


@dataclass(frozen=True)
class FoldLayerNorms(Pass):
    """x = Gather(E, ids); n = LayerNorm(x, g, b); y = Gemm(n, W, c); x2 = Add(x, Gemm(z, V, d))   becomes
    x' = Gather(E P, ids); n' = RMSNorm(x', g); y = Gemm(n', W, c + W b); x2' = Add(x', Gemm(z, P V, P d))

    P subtracts the mean over the channels. The stream x' = x P has mean 0 everywhere, and then both norms divide by the same
    number (SliceGPT, arXiv:2401.15024). Refuses, and changes nothing, where anything but LayerNorms that feed linears reads
    the stream (BLOOM's residual connection after the norm).
    """

    phase: ClassVar[Phase] = Phase.OUTLIERS

    def run(self, model: ir.Model) -> PassResult:
        graph = model.graph
        if not any(node.op_type == "LayerNormalization" for node in graph):
            return PassResult()
        stream, reason = find_stream(graph, "LayerNormalization")
        if reason:
            return PassResult(0, (reason,))
        for node in stream.tables:
            replace_weight(node, Role.TABLE, _center_rows, graph, "centered", by_rows=True)
        for node in stream.writers:
            centered = [basis.Change("outputs", "center")]
            replace_weight(node, Role.WEIGHT, _center_columns, graph, "centered", changes=centered)
            replace_weight(node, Role.BIAS, _center_vector, graph, "centered", changes=centered)
        for norm in stream.norms:
            bias = operand(norm, Role.BIAS)
            if bias is not None and bias.const_value is not None:
                for reader in list(norm.outputs[0].consumers()):
                    add_bias(reader, bias.const_value, graph)
            rms = make_node("RMSNormalization", norm.inputs[:2], str(norm.name),
                            attributes={"epsilon": attributes_of(norm)["epsilon"]})  # fmt: skip
            apply(Replacement([norm], [rms], {norm.outputs[0]: rms.outputs[0]}), graph)
        return PassResult(len(stream.norms))


def add_bias(reader: ir.Node, shift: ir.TensorProtocol, graph: ir.Graph) -> None:
    """Let a linear add what the bias of the norm before it contributed: Gemm(n + shift, W, c) = Gemm(n, W, c + W shift)."""
    weight, old, index = operand(reader, Role.WEIGHT), operand(reader, Role.BIAS), spec_of(reader).index(Role.BIAS)
    assert weight is not None and weight.const_value is not None and index is not None
    name = f"{old.name}.shifted" if old is not None else f"{reader.name}.shift"
    bias = None if old is None else old.const_value
    compute = partial(_shifted, weight.const_value, shift, bias)
    sources = [tensor for tensor in (bias, weight.const_value, shift) if tensor is not None]
    shape = weight.const_value.shape.numpy()[:1]
    tensor = lazy(name, compute, shape, ir.DataType.FLOAT, step="shifted", sources=sources)
    # The weight stays as it is, so that its bias has the changes up to here, and the addend that its inputs lack from now on.
    basis.record(tensor, basis.changed(weight.const_value, [basis.Change("inputs", "shift", arrays={"vector": shift})]))
    value = make_initializer(tensor)
    graph.register_initializer(value)
    reader.resize_inputs(max(len(reader.inputs), index + 1))
    reader.replace_input_with(index, value)
    if old is not None and not old.uses():
        del graph.initializers[str(old.name)]


def _shifted(weight: ir.TensorProtocol, shift: ir.TensorProtocol, bias: ir.TensorProtocol | None) -> Floats:
    """float32 [outputs]: weight @ shift + bias, with the product in float64."""
    vector, count = shift.numpy().astype(np.float64), weight.shape.numpy()[0]
    matrix = None if has_rows(weight) else weight.numpy()
    chunks = []
    for start in range(0, count, _ROWS):
        stop = min(start + _ROWS, count)
        chunks.append((read_rows(weight, start, stop) if matrix is None else matrix[start:stop]) @ vector)
    product: Floats = np.concatenate(chunks).astype(np.float32)
    total: Floats = product if bias is None else product + bias.numpy()
    return total


def _center_rows(table: Floats) -> Floats:
    for start in range(0, len(table), _ROWS):
        rows = table[start : start + _ROWS]
        rows -= rows.mean(axis=1, keepdims=True, dtype=np.float64).astype(np.float32)
    return table


def _center_columns(weight: Floats) -> Floats:
    centered: Floats = weight - weight.mean(axis=0, keepdims=True, dtype=np.float64).astype(np.float32)
    return centered


def _center_vector(bias: Floats) -> Floats:
    centered: Floats = bias - np.float32(bias.mean(dtype=np.float64))
    return centered
