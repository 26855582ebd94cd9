"""Linears that read the same input become one: q, k and v; gate and up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from belle_compile.compiler.ir.build import make_initializer, make_node
from belle_compile.compiler.ir.lazy import Shared, lazy, made_of
from belle_compile.compiler.ir.ops import spec_of
from belle_compile.passes.base import Phase, Replacement, RewritePass, is_weight, other_readers

# input of the weight: before it is what the linears share, the bias comes last
_WEIGHT = {"Gemm": 1, "QuantizedLinear": 2, "GroupQuantizedLinear": 2}


@dataclass(frozen=True)
class FuseProjections(RewritePass[list[ir.Node]]):
    """a = Linear(x, wa, ba); b = Linear(x, wb, bb)   becomes   a, b = Split(Linear(x, [wa; wb], [ba; bb]))

    Linear is Gemm, QuantizedLinear or GroupQuantizedLinear (so INT8 graphs need FuseDequantize first). Weights, scales and
    biases are concatenated when they are read. A linear without bias among others with one gets zeros. Refuses when a weight
    is computed or has another reader, which would store it twice.
    """

    phase: ClassVar[Phase] = Phase.FUSION

    def pattern(self, node: ir.Node) -> list[ir.Node] | None:
        if node.op_type not in _WEIGHT or node.graph is None:
            return None
        shared = tuple(node.inputs[: _WEIGHT[node.op_type]])
        group = [
            other for other in node.graph if other.op_type == node.op_type and tuple(other.inputs[: len(shared)]) == shared
        ]
        return group if group[0] is node and len(group) > 1 else None

    def check(self, match: list[ir.Node]) -> str:
        for node in match:
            for value in node.inputs[_WEIGHT[node.op_type] :]:
                if value is None:
                    continue
                if not is_weight(value):
                    return f"{value.name} of {node.name} is computed"
                readers = other_readers(value, node)
                if readers:
                    return f"{value.name} is also read by {', '.join(readers)} and would be stored twice"
        return ""

    def rewrite(self, match: list[ir.Node], graph: ir.Graph) -> Replacement:
        first = match[0]
        at = _WEIGHT[first.op_type]
        full = len(spec_of(first).inputs)  # inputs when there is a bias
        columns = [[_tensor(node.inputs[index]) for node in match] for index in range(at, full - 1)]
        rows = [tensor.shape.numpy()[0] for tensor in columns[0]]
        weights = _stack(columns)
        if any(len(node.inputs) == full for node in match):
            weights += _stack([[_bias(node, full - 1, count) for node, count in zip(match, rows, strict=True)]])
        name = joined([str(node.name) for node in match])
        sizes = make_initializer(ir.Tensor(np.asarray(rows, np.int64), name=f"{name}.sizes"))
        stacked = [make_initializer(tensor) for tensor in weights]
        for value in (*stacked, sizes):
            graph.register_initializer(value)
        attributes = {key: attribute.value for key, attribute in first.attributes.items()}
        linear = make_node(first.op_type, [*first.inputs[:at], *stacked], name, attributes=attributes)
        split = make_node("Split", [linear.outputs[0], sizes], f"{name}.split", attributes={"axis": -1})
        parts = zip(match, split.outputs, strict=True)
        return Replacement(match, [linear, split], {node.outputs[0]: part for node, part in parts})


def joined(names: Sequence[str]) -> str:
    """One name of several: what differs between the dots is joined, h.0.q and h.0.k give h.0.q+k."""
    words = [name.split(".") for name in names]
    longest = min(map(len, words)) - 1
    head = next((i for i in range(longest) if len({word[i] for word in words}) > 1), longest)
    tail = next((i for i in range(longest - head) if len({word[-1 - i] for word in words}) > 1), longest - head)
    middle = "+".join(".".join(word[head : len(word) - tail]) for word in words)
    return ".".join([*words[0][:head], middle, *words[0][len(words[0]) - tail :]])


def _tensor(value: ir.Value | None) -> ir.TensorProtocol:
    assert value is not None and value.const_value is not None
    return value.const_value


def _bias(node: ir.Node, index: int, rows: int) -> ir.TensorProtocol:
    if len(node.inputs) > index:
        return _tensor(node.inputs[index])
    return lazy(f"{node.name}.bias", lambda: np.zeros(rows, np.float32), [rows], ir.DataType.FLOAT, step="zeros")


def _stack(columns: Sequence[Sequence[ir.TensorProtocol]]) -> list[ir.LazyTensor]:
    """Each column's tensors along axis 0. All columns are read together, part by part: a part's integers and scales
    are computed at once, so that reading one column after the other would compute each part twice."""
    rows = [tensor.shape.numpy()[0] for tensor in columns[0]]
    shapes = [(sum(rows), *column[0].shape.numpy()[1:]) for column in columns]

    def read() -> tuple[npt.NDArray[Any], ...]:
        results = tuple(np.empty(shape, column[0].dtype.numpy()) for shape, column in zip(shapes, columns, strict=True))
        start = 0
        for part, count in zip(zip(*columns, strict=True), rows, strict=True):
            for result, tensor in zip(results, part, strict=True):
                result[start : start + count] = tensor.numpy()
            start += count
        return results

    shared = Shared(read)
    names = [joined([str(tensor.name) for tensor in column]) for column in columns]
    return [
        made_of(lazy(names[index], partial(shared.__getitem__, index), shapes[index], column[0].dtype), column)
        for index, column in enumerate(columns)
    ]
