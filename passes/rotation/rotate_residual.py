"""R1: the residual stream is rotated, which costs nothing when running: every weight around it absorbs the rotation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from belle_compile.compiler.ir.build import make_initializer
from belle_compile.passes.base import Pass, PassResult, Phase
from belle_compile.passes.rotation.hadamard import Rotation
from belle_compile.passes.rotation.stream import find_stream
from belle_compile.passes.rotation.weights import replace_weight

Floats = npt.NDArray[np.float32]
_DONE = "rotated_residual"  # metadata of a model whose stream is rotated: rotating twice would undo nothing and help nothing


@dataclass(frozen=True)
class RotateResidual(Pass):
    """x = Gather(E, ids); n = RMSNorm(x, g); y = Gemm(n, W); x2 = Add(x, Gemm(z, V, b))   becomes
    x' = Gather(E Q, ids); n' = RMSNorm(x', 1); y = Gemm(n', W diag(g) Q); x2' = Add(x', Gemm(z, Q.T V, b Q))

    x' = x Q for a random Hadamard matrix Q: lengths stay, outliers are spread over all channels. A head that is tied to the
    embedding gets a weight of its own. Refuses, and changes nothing, where the stream is read by anything but
    RMS norms that feed linears; FoldLayerNorms makes such norms of BLOOM's.
    """

    phase: ClassVar[Phase] = Phase.OUTLIERS
    seed: int = 0

    def run(self, model: ir.Model) -> PassResult:
        if _DONE in model.metadata_props:
            return PassResult()
        stream, reason = find_stream(model.graph, "RMSNormalization")
        if reason:
            return PassResult(0, (reason,))
        graph, norm = model.graph, stream.norms[0].inputs[1]
        assert norm is not None and norm.shape is not None
        size = int(norm.shape.numpy()[0])
        rotation = Rotation(size, self.seed)
        for node in stream.tables:
            replace_weight(node, 0, partial(_rotate_rows, rotation), graph, by_rows=True)
        for node in stream.readers:
            replace_weight(node, 1, partial(_read, rotation, _scale_before(node)), graph, by_rows=True)
        for node in stream.writers:
            replace_weight(node, 1, rotation.left, graph)
            if len(node.inputs) > 2 and node.inputs[2] is not None:
                replace_weight(node, 2, partial(_rotate_vector, rotation), graph)
        ones = make_initializer(ir.Tensor(np.ones(size, np.float32), name="rotated_norms.ones"))
        graph.register_initializer(ones)
        for node in stream.norms:
            old = node.inputs[1]
            node.replace_input_with(1, ones)
            if old is not None and not old.uses():
                del graph.initializers[str(old.name)]
        model.metadata_props[_DONE] = str(self.seed)
        return PassResult(len(stream.tables) + len(stream.writers) + len(stream.readers))


def _scale_before(reader: ir.Node) -> ir.TensorProtocol:
    """The weight of the norm whose output a linear reads."""
    source = reader.inputs[0]
    norm = source.producer() if source is not None else None
    scale = norm.inputs[1] if norm is not None else None
    assert scale is not None and scale.const_value is not None
    return scale.const_value


def _read(rotation: Rotation, scale: ir.TensorProtocol, weight: Floats) -> Floats:
    return rotation.right(weight, scale=scale.numpy(), out=weight)


def _rotate_rows(rotation: Rotation, table: Floats) -> Floats:
    return rotation.right(table, out=table)


def _rotate_vector(rotation: Rotation, bias: Floats) -> Floats:
    rotated: Floats = rotation.right(bias[None])[0]
    return rotated
