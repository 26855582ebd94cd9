"""R1: the residual stream is rotated at no cost in a step, because every weight around it absorbs the rotation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from belle_compile.compiler.ir.basis import Change
from belle_compile.compiler.ir.build import make_initializer, make_node
from belle_compile.compiler.ir.lazy import lazy
from belle_compile.compiler.ir.ops import operand, spec_of
from belle_compile.compiler.ir.signature import Role
from belle_compile.passes.base import Pass, PassResult, Phase
from belle_compile.passes.quantization.groups import give_bits
from belle_compile.passes.rotation.hadamard import Rotation
from belle_compile.passes.rotation.stream import find_stream
from belle_compile.passes.rotation.weights import replace_weight

Floats = npt.NDArray[np.float32]
_DONE = "rotated_residual"  # metadata of a model whose stream is rotated already


@dataclass(frozen=True)
class RotateResidual(Pass):
    """x = Gather(E, ids); n = RMSNorm(x, g); y = Gemm(n, W); x2 = Add(x, Gemm(z, V, b))   becomes
    x' = Gather(E Q, ids); n' = RMSNorm(x', 1); y = Gemm(n', W diag(g) Q); x2' = Add(x', Gemm(z, Q.T V, b Q))

    x' = x Q for a random Hadamard matrix Q (R1 of SpinQuant, arXiv:2405.16406), which keeps lengths and spreads outliers over
    all channels. A head that is tied to the embedding gets a weight of its own, because it absorbs the gain g of the norm that
    it reads, which the table does not have. With `keeps_tied` it reads the table, and a product before it does what g does:

    h = Gemm(n, E)   becomes   h' = Gemm(Gemm(n', Q.T diag(g) Q), E Q)

    Refuses, and changes nothing, where anything but RMS norms that feed linears reads the stream; FoldLayerNorms turns BLOOM's
    norms into RMS norms.
    """

    phase: ClassVar[Phase] = Phase.OUTLIERS
    seed: int = 0
    keeps_tied: bool = False

    @property
    def options(self) -> dict[str, Any]:
        return {"seed": self.seed} | ({"keeps_tied": True} if self.keeps_tied else {})

    def run(self, model: ir.Model) -> PassResult:
        if _DONE in model.metadata_props:
            return PassResult()
        stream, reason = find_stream(model.graph, "RMSNormalization")
        if reason:
            return PassResult(0, (reason,))
        graph, gain = model.graph, operand(stream.norms[0], Role.GAIN)
        assert gain is not None and gain.shape is not None
        size = int(gain.shape.numpy()[0])
        rotation = Rotation(size, self.seed)
        parts = rotation.parts()
        tables = {operand(node, Role.TABLE): node for node in stream.tables}
        tied = [node for node in stream.readers if self.keeps_tied and operand(node, Role.WEIGHT) in tables]
        for node in stream.tables:
            replace_weight(node, Role.TABLE, partial(_rotate_rows, rotation), graph, by_rows=True)
        for node in tied:
            _keep_tied(node, tables[operand(node, Role.WEIGHT)], rotation, graph)
        for node in stream.readers:
            if node in tied:
                continue
            gain_before = _gain_before(node)
            changes = Change("inputs", "scale", arrays={"factors": gain_before}), Change("inputs", "rotate", arrays=parts)
            change = partial(_absorb_gain, rotation, gain_before)
            replace_weight(node, Role.WEIGHT, change, graph, by_rows=True, changes=changes)
        for node in stream.writers:
            rotated = [Change("outputs", "rotate", arrays=parts)]
            replace_weight(node, Role.WEIGHT, rotation.left, graph, changes=rotated)
            replace_weight(node, Role.BIAS, partial(_rotate_vector, rotation), graph, changes=rotated)
        ones = make_initializer(ir.Tensor(np.ones(size, np.float32), name="rotated_norms.ones"))
        graph.register_initializer(ones)
        for node in stream.norms:
            old, index = operand(node, Role.GAIN), spec_of(node).index(Role.GAIN)
            assert index is not None
            node.replace_input_with(index, ones)
            if old is not None and not old.uses():
                del graph.initializers[str(old.name)]
        model.metadata_props[_DONE] = str(self.seed)
        return PassResult(len(stream.tables) + len(stream.writers) + len(stream.readers))


def _keep_tied(head: ir.Node, embedding: ir.Node, rotation: Rotation, graph: ir.Graph) -> None:
    """Let a head read the rotated table of its embedding, behind a product that does what the norm's gain did."""
    gain, source, index = _gain_before(head), head.inputs[0], spec_of(head).index(Role.WEIGHT)
    old, size = operand(head, Role.WEIGHT), rotation.size
    assert old is not None and source is not None and index is not None
    name = f"{head.name}.gain"
    matrix = lazy(
        f"{name}.weight", lambda: rotation.left(rotation.right(np.diag(gain.numpy()))), (size, size), ir.DataType.FLOAT,
        step="rotated", sources=[gain],
    )  # fmt: skip
    weight = make_initializer(matrix)
    graph.register_initializer(weight)
    product = make_node("Gemm", [source, weight], name, attributes={"transB": 1})
    give_bits(product, 8)
    graph.insert_before(head, [product])
    head.replace_input_with(0, product.outputs[0])
    head.replace_input_with(index, operand(embedding, Role.TABLE))
    if not old.uses():
        del graph.initializers[str(old.name)]


def _gain_before(reader: ir.Node) -> ir.TensorProtocol:
    """The gain of the norm whose output a linear reads."""
    source = reader.inputs[0]
    norm = source.producer() if source is not None else None
    gain = operand(norm, Role.GAIN) if norm is not None else None
    assert gain is not None and gain.const_value is not None
    return gain.const_value


def _absorb_gain(rotation: Rotation, gain: ir.TensorProtocol, weight: Floats) -> Floats:
    """weight @ diag(gain) @ Q, in place."""
    return rotation.right(weight, scale=gain.numpy(), out=weight)


def _rotate_rows(rotation: Rotation, table: Floats) -> Floats:
    return rotation.right(table, out=table)


def _rotate_vector(rotation: Rotation, bias: Floats) -> Floats:
    rotated: Floats = rotation.right(bias[None])[0]
    return rotated
