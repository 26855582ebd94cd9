"""Channels of similar size become neighbours, for formats whose blocks of neighbours share a scale (RPTQ, arXiv:2304.01089)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from safetensors.numpy import load_file
from safetensors.torch import save_file

from belle_compile.compiler.ir import basis
from belle_compile.compiler.ir.basis import Side
from belle_compile.compiler.ir.build import make_initializer
from belle_compile.compiler.ir.lazy import has_rows, lazy, read_rows
from belle_compile.compiler.ir.ops import operand, spec_of
from belle_compile.compiler.ir.signature import Role
from belle_compile.compiler.ir.stream import ActivationStream, Tensor, linears
from belle_compile.passes.base import Pass, PassResult, Phase, is_weight, other_readers
from belle_compile.passes.calibration.data import CalibrationData
from belle_compile.passes.calibration.work import walk
from belle_compile.passes.rotation.stream import has_float_weight, projection_of

Floats = npt.NDArray[np.float32]
Order = npt.NDArray[np.intp]
_DONE = "reordered_channels"  # metadata of a model whose channels are sorted already
_TOKENS = 2048  # of calibration requests by which channels are sorted
_NORMS = ("LayerNormalization", "RMSNormalization")
_ACTIVATIONS = ("SwiGLU", "Gelu")


@dataclass(frozen=True)
class _Part:
    """Elements of a node's weight (or of another operand with this role) that lie in the order of the channels: on an `axis`,
    from `start` on, as many as there are channels."""

    node: ir.Node
    role: Role
    axis: int
    start: int = 0


@dataclass(frozen=True)
class _Channels:
    """Channels whose order is free: `measured` reads them, and all `parts` lie in their order."""

    measured: ir.Node
    parts: tuple[_Part, ...]


@dataclass(frozen=True)
class ReorderChannels(Pass):
    """x = Gather(E, ids); n = RMSNorm(x, g); y = Gemm(n, W); x2 = Add(x, Gemm(z, V, b))   becomes
    x' = Gather(E[:, p], ids); n' = RMSNorm(x', g[p]); y = Gemm(n', W[:, p]); x2' = Add(x', Gemm(z, V[p], b[p]))

    p sorts the channels by the root mean square of what the head reads on calibration requests. Norms, LayerNorms too, and a
    head that is tied to the embedding compute the same for any order. Likewise y = Gemm(Gelu(Gemm(x, U, b)), D) becomes
    y = Gemm(Gelu(Gemm(x, U[p], b[p])), D[:, p]), and SwiGLU, with the channels sorted by what D reads. Refuses a residual
    stream that anything but norms and linears reads, and activations that other nodes read.
    """

    phase: ClassVar[Phase] = Phase.OUTLIERS
    data: CalibrationData = field(repr=False)

    @property
    def options(self) -> dict[str, Any]:
        return self.data.describe()

    def run(self, model: ir.Model) -> PassResult:
        found, refusals = _all_channels(model.graph)
        if not found or _DONE in model.metadata_props:
            return PassResult(0, refusals)
        data = _part(self.data)
        work, segments = walk(data, model, self.name, data.key(model, self.options))
        files = {channels.measured: work.file(f"{i:05d}") for i, channels in enumerate(found)}
        for stream, number in segments():
            _segment(stream, number, files)
        orders = [np.argsort(load_file(files[each.measured])["squares"], kind="stable") for each in found]
        changed: dict[tuple[ir.Value, int], ir.Value] = {}
        for channels, order in zip(found, orders, strict=True):
            for part in channels.parts:
                _reorder(part, order, changed, model.graph)
        model.metadata_props[_DONE] = self.data.digest
        return PassResult(len(found), refusals)


def _part(data: CalibrationData) -> CalibrationData:
    """The first sequences: the sizes of channels need fewer tokens than the integers of weights."""
    tokens, count = 0, 0
    while tokens < _TOKENS and count < len(data.sequences):
        tokens += len(data.sequences[count])
        count += 1
    return replace(data, sequences=data.sequences[:count])


def _segment(stream: ActivationStream, number: int, files: dict[ir.Node, Path]) -> None:
    """Sum the squares of each channel that a segment's linears read, and write the activations that the next segment reads."""
    squares: dict[ir.Node, Tensor] = {}

    def observe(node: ir.Node, x: Tensor) -> Tensor:
        if node in files:
            total = x.double().square().sum(dim=0)
            squares[node] = squares[node] + total if node in squares else total
        return x

    stream.forward(number, stream.load(number), on_linear=observe)
    for node in linears(stream.segments[number]):
        if node in squares:
            save_file({"squares": squares[node].cpu()}, files[node])


def _all_channels(graph: ir.Graph) -> tuple[list[_Channels], tuple[str, ...]]:
    """The channels of the residual stream and of each feed-forward whose order is free, and why that of others is not."""
    found, refusals = [], []
    residual, reason = _residual(graph)
    if residual is not None:
        found.append(residual)
    elif reason:
        refusals.append(reason)
    for node in graph:
        if node.op_type in _ACTIVATIONS:
            hidden, reason = _hidden(node)
            if hidden is not None:
                found.append(hidden)
            else:
                refusals.append(f"{node.name}: {reason}")
    return found, tuple(refusals)


def _residual(graph: ir.Graph) -> tuple[_Channels | None, str]:
    parts: list[_Part] = []
    values: set[ir.Value] = set()
    head: ir.Node | None = None
    for node in graph:
        read = [value for value in node.inputs if value in values]
        if is_weight(operand(node, Role.TABLE)):
            parts.append(_Part(node, Role.TABLE, 1))
        elif not read:
            continue
        elif operand(node, Role.TABLE) in values:
            pass  # the rows whose logits are computed
        elif node.op_type == "Add":
            writers, reason = _writers(node, values)
            if reason:
                return None, reason
            parts += [_Part(writer, role, 0) for writer in writers for role in (Role.WEIGHT, Role.BIAS)]
        elif node.op_type in _NORMS and len(read) == 1:
            parts += [_Part(node, role, 0) for role in (Role.GAIN, Role.BIAS)]
        elif has_float_weight(node):
            parts.append(_Part(node, Role.WEIGHT, 1))
            head = node if node.outputs[0].is_graph_output() else head
            continue  # what it computes is not the stream
        else:
            return None, f"{node.name}: the residual stream is read by {node.op_type}"
        values.add(node.outputs[0])
    return (None, "") if head is None else (_Channels(head, tuple(parts)), "")


def _writers(add: ir.Node, values: set[ir.Value]) -> tuple[list[ir.Node], str]:
    """The linears whose outputs an Add adds to the stream, or why their rows cannot be reordered."""
    writers = []
    for addend in add.inputs:
        if addend is None or addend in values:
            continue
        writer = addend.producer()
        if writer is None or not has_float_weight(writer):
            return [], f"{add.name}: adds something else than the output of a linear"
        if others := other_readers(addend, add):
            return [], f"{add.name}: what it adds is also read by {', '.join(others)}"
        writers.append(writer)
    return writers, ""


def _hidden(node: ir.Node) -> tuple[_Channels | None, str]:
    """The channels of an activation function, which are the rows of the linears before it and the columns of the one after."""
    readers = list(node.outputs[0].consumers())
    if len(readers) != 1 or not has_float_weight(readers[0]):
        return None, "its output is not read by one linear alone"
    parts = [_Part(readers[0], Role.WEIGHT, 1)]
    for value in node.inputs:
        assert value is not None
        if others := other_readers(value, node):
            return None, f"{value.name} is also read by {', '.join(others)}"
        linear, start, reason = projection_of(value)
        if linear is None or reason:
            return None, reason or f"{value.name} does not come from a linear"
        parts += [_Part(linear, role, 0, start) for role in (Role.WEIGHT, Role.BIAS)]
    for part in parts:
        weight = operand(part.node, part.role)
        if weight is not None and (others := other_readers(weight, part.node)):
            return None, f"{weight.name} is also read by {', '.join(others)}"
    return _Channels(readers[0], tuple(parts)), ""


def _reorder(part: _Part, order: Order, changed: dict[tuple[ir.Value, int], ir.Value], graph: ir.Graph) -> None:
    """Let a node read a part in another order. Nodes that read the same weight, a tied table, read the same new one."""
    index, old = spec_of(part.node).index(part.role), operand(part.node, part.role)
    if index is None or old is None:
        return
    assert old.const_value is not None
    axis = part.axis
    if (old, axis) not in changed:
        taken = _places(old.const_value.shape.numpy()[axis], order, part.start)
        changed[old, axis] = _taken(old, axis, taken, graph)
    part.node.replace_input_with(index, changed[old, axis])
    if not old.uses():
        del graph.initializers[str(old.name)]


def _places(size: int, order: Order, start: int) -> Order:
    """For each of `size` places, the place whose element comes there: those from `start` on are reordered, the others stay."""
    places = np.arange(size)
    places[start : start + len(order)] = start + order
    return places


def _taken(old: ir.Value, axis: int, places: Order, graph: ir.Graph) -> ir.Value:
    source = old.const_value
    assert source is not None
    by_rows = axis == 1 and has_rows(source)
    rows = (lambda start, stop: _take(read_rows(source, start, stop), places, axis)) if by_rows else None
    tensor = lazy(f"{old.name}.reordered{axis}", lambda: _take(source.numpy(), places, axis), source.shape.numpy(),
                  ir.DataType.FLOAT, rows, step="reordered", sources=[source])  # fmt: skip
    side: Side = "inputs" if axis == 1 else "outputs"
    basis.record(tensor, basis.changed(source, [basis.Change(side, "reorder", arrays={"order": places})]))
    value = make_initializer(tensor)
    graph.register_initializer(value)
    return value


def _take(weight: Floats, places: Order, axis: int) -> Floats:
    taken: Floats = np.take(weight, places, axis)
    return taken
