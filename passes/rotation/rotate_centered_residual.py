"""R1 for models that keep their LayerNorms: a rotation that leaves the all-ones vector in place commutes with their means."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from belle_compile.compiler.ir.build import make_initializer, make_node
from belle_compile.compiler.ir.lazy import has_rows, lazy, read_rows
from belle_compile.compiler.ir.ops import attributes_of, operand, spec_of
from belle_compile.compiler.ir.signature import Role
from belle_compile.passes.base import Pass, PassResult, Phase, Replacement, apply
from belle_compile.passes.rotation.fold_embedding_norm import FoldEmbeddingNorm
from belle_compile.passes.rotation.fold_layer_norms import add_bias
from belle_compile.passes.rotation.hadamard import CenteredRotation
from belle_compile.passes.rotation.stream import Stream, find_stream
from belle_compile.passes.rotation.weights import own, replace_weight

Floats = npt.NDArray[np.float32]
_DONE = "rotated_centered_residual"  # metadata of a model whose stream is rotated already
_ROWS = 4096  # rows of a table computed at a time
_LARGEST_SHARE = 0.9  # of its gain that the norm of an embedding may reach, see `_inverse_norm`


@dataclass(frozen=True)
class RotateCenteredResidual(Pass):
    """e = LayerNorm(Gather(E, ids), g0, b0); n = LayerNorm(x, g, b); y = Gemm(n, W, c); x2 = Add(x, Gemm(z, V, d))   becomes
    e' = LayerNorm(Gather(E', ids), c0, 0); n' = LayerNorm(x', 1, 0); y = Gemm(n', W diag(g) Q, c + W b);
    x2' = Add(x', Gemm(z, Q.T V, d Q))

    x' = x Q, apart from its mean, for an orthogonal Q whose rows and columns add up to 1: mean subtraction commutes with it,
    and the model keeps its LayerNorms. The last norm keeps the bias b / g Q, since a head has no bias. No LayerNorm with a
    constant gain c0 gives all rotated embeddings e Q, because they differ in length; but the epsilon of the norm shortens what
    it divides, so that E' has the directions of e Q and the lengths which the norm turns into theirs. A tied head gets a weight
    of its own. Refuses, and changes nothing, where anything but LayerNorms that feed linears reads the stream (BLOOM's residual
    connection after the norm), and where a gain of the last norm is 0.
    """

    phase: ClassVar[Phase] = Phase.OUTLIERS
    seed: int = 0

    def run(self, model: ir.Model) -> PassResult:
        graph = model.graph
        if _DONE in model.metadata_props or not any(node.op_type == "LayerNormalization" for node in graph):
            return PassResult()
        trial = model.clone()
        FoldEmbeddingNorm().run(trial)
        stream, reason = find_stream(trial.graph, "LayerNormalization")
        if reason := reason or _zero_gain(stream):
            return PassResult(0, (reason,))
        embedding_norms = [node for node in graph if _reads_table(node)]
        restored = {str(node.name): (str(_source(node).name), attributes_of(node)["epsilon"]) for node in embedding_norms}
        FoldEmbeddingNorm().run(model)
        stream, _ = find_stream(graph, "LayerNormalization")
        rotation = CenteredRotation(_width(stream), self.seed)
        for node in stream.tables:
            replace_weight(node, Role.TABLE, partial(_rotate_rows, rotation), graph, by_rows=True)
        for node in stream.writers:
            replace_weight(node, Role.WEIGHT, rotation.left, graph)
            replace_weight(node, Role.BIAS, partial(_rotate_vector, rotation), graph)
        for node in stream.norms:
            _make_plain(node, rotation, graph)
        for node in stream.tables:
            if str(node.name) in restored:
                _restore_norm(node, *restored[str(node.name)], graph)
        graph.sort()
        model.metadata_props[_DONE] = str(self.seed)
        return PassResult(len(stream.tables) + len(stream.writers) + len(stream.readers))


def _reads_table(node: ir.Node) -> bool:
    """Whether a node is the norm of an embedding."""
    return node.op_type == "LayerNormalization" and operand(_source(node), Role.TABLE) is not None if node.inputs else False


def _source(node: ir.Node) -> ir.Node:
    value = node.inputs[0]
    producer = value.producer() if value is not None else None
    assert producer is not None, f"{node.name} reads what a node computes"
    return producer


def _width(stream: Stream) -> int:
    gain = operand(stream.norms[0], Role.GAIN)
    assert gain is not None and gain.shape is not None
    return int(gain.shape.numpy()[0])


def _zero_gain(stream: Stream) -> str:
    """Why the bias of a norm before a head cannot be kept; empty where it can."""
    for norm in stream.norms:
        gain = operand(norm, Role.GAIN)
        assert gain is not None and gain.const_value is not None
        if _feeds_head(norm) and not np.all(gain.const_value.numpy()):
            return f"{norm.name}: a gain is 0, so that its bias cannot be expressed by the rotated norm"
    return ""


def _feeds_head(norm: ir.Node) -> bool:
    return any(reader.outputs[0].is_graph_output() for reader in norm.outputs[0].consumers())


def _make_plain(norm: ir.Node, rotation: CenteredRotation, graph: ir.Graph) -> None:
    """Let the readers of a norm absorb its gain, its bias and the rotation."""
    gain, bias = (operand(norm, role) for role in (Role.GAIN, Role.BIAS))
    assert gain is not None and gain.const_value is not None and gain.const_value.name
    width, name, shift = rotation.size, str(norm.name), None if bias is None else bias.const_value
    kept = np.zeros(width, np.float32)
    if shift is not None and _feeds_head(norm):
        kept = _rotate_vector(rotation, shift.numpy() / gain.const_value.numpy())
    for reader in list(norm.outputs[0].consumers()):
        if shift is not None and not _feeds_head(norm):
            add_bias(reader, shift, graph)
        replace_weight(reader, Role.WEIGHT, partial(_absorb_gain, rotation, gain.const_value), graph, by_rows=True)
    values = [make_initializer(ir.Tensor(values, name=f"{name}.{kind}.rotated")) for kind, values in
              (("weight", np.ones(width, np.float32)), ("bias", kept))]  # fmt: skip
    for role, value in zip((Role.GAIN, Role.BIAS), values, strict=True):
        old, index = operand(norm, role), spec_of(norm).index(role)
        assert index is not None
        graph.register_initializer(value)
        norm.resize_inputs(max(len(norm.inputs), index + 1))
        norm.replace_input_with(index, value)
        if old is not None and not old.uses():
            del graph.initializers[str(old.name)]


def _restore_norm(gather: ir.Node, table_name: str, epsilon: float, graph: ir.Graph) -> None:
    """x = Gather(T, ids)   becomes   x = LayerNorm(Gather(E', ids), c0, 0), apart from the means of its rows."""
    table, ids = operand(gather, Role.TABLE), operand(gather, Role.INDEX)
    assert table is not None and table.const_value is not None
    source, name = table.const_value, f"{table.name}.unnormalized"
    rows_count, width = source.shape.numpy()
    largest = max(float(_deviations(_rows(source, start)).max()) for start in range(0, rows_count, _ROWS))
    gain = np.float32(largest / _LARGEST_SHARE if largest > 0 else 1.0)
    change = partial(_inverse_norm, gain, epsilon)
    rows = (lambda start, stop: change(read_rows(source, start, stop))) if has_rows(source) else None
    tensor = lazy(name, lambda: change(own(source)), (rows_count, width), ir.DataType.FLOAT, rows, step="unnormalized",
                  sources=[source])  # fmt: skip
    parts = {"weight": np.full(width, gain, np.float32), "bias": np.zeros(width, np.float32)}
    values = [make_initializer(tensor)]
    values += [make_initializer(ir.Tensor(part, name=f"{gather.name}.{kind}.rotated")) for kind, part in parts.items()]
    for value in values:
        graph.register_initializer(value)
    embedded = make_node("Gather", [values[0], ids], table_name, attributes={"axis": 0})
    norm = make_node("LayerNormalization", [embedded.outputs[0], *values[1:]], str(gather.name),
                     attributes={"axis": -1, "epsilon": epsilon})  # fmt: skip
    apply(Replacement([gather], [embedded, norm], {gather.outputs[0]: norm.outputs[0]}), graph)


def _rows(source: ir.TensorProtocol, start: int) -> Floats:
    count = source.shape.numpy()[0]
    stop = min(start + _ROWS, count)
    return read_rows(source, start, stop) if has_rows(source) else source.numpy()[start:stop]


def _deviations(rows: Floats) -> npt.NDArray[np.float64]:
    """float64 [rows]: the standard deviation of each row."""
    deviations: npt.NDArray[np.float64] = rows.std(axis=1, dtype=np.float64)
    return deviations


def _inverse_norm(gain: np.float32, epsilon: float, rows: Floats) -> Floats:
    """Rows which a LayerNorm with constant gain turns into `rows` without their means, in place.

    It turns a row of variance v into one of deviation s = gain sqrt(v / (v + epsilon)), so that v = epsilon r / (1 - r) with
    r = (s / gain)^2, which is below 1 because no row has more than 0.9 of the gain.
    """
    for start in range(0, len(rows), _ROWS):
        block = rows[start : start + _ROWS]
        centered = block.astype(np.float64)
        centered -= centered.mean(axis=1, keepdims=True)
        deviation = np.sqrt(np.square(centered).mean(axis=1))
        share = np.square(deviation / float(gain))
        wanted = np.sqrt(epsilon * share / (1 - share))
        block[...] = centered * np.where(deviation > 0, wanted / np.where(deviation > 0, deviation, 1), 0)[:, None]
    return rows


def _absorb_gain(rotation: CenteredRotation, gain: ir.TensorProtocol, weight: Floats) -> Floats:
    """weight @ diag(gain) @ Q, in place."""
    return rotation.right(weight, scale=gain.numpy(), out=weight)


def _rotate_rows(rotation: CenteredRotation, table: Floats) -> Floats:
    return rotation.right(table, out=table)


def _rotate_vector(rotation: CenteredRotation, bias: Floats) -> Floats:
    rotated: Floats = rotation.right(np.ascontiguousarray(bias[None]))[0]
    return rotated
