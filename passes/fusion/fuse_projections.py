"""Linears that read the same input become one linear: q, k and v; gate and up."""

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
from belle_compile.compiler.ir.ops import attributes_of, spec_of
from belle_compile.compiler.ir.signature import OF_OUTPUTS, Role
from belle_compile.passes.base import Phase, Replacement, RewritePass, is_weight, other_readers


@dataclass(frozen=True)
class FuseProjections(RewritePass[list[ir.Node]]):
    """a = Linear(x, wa, ba); b = Linear(x, wb, bb)   becomes   a, b = Split(Linear(x, [wa; wb], [ba; bb]))

    Linear is any linear op whose result is scaled, so that INT8 graphs need FuseDequantize first. Weights, scales and biases
    are concatenated when they are read. A linear without bias (or zero points) among others that have some gets zeros. Refuses
    when a weight is computed, or has another reader and would be stored twice.
    """

    phase: ClassVar[Phase] = Phase.FUSION

    def pattern(self, node: ir.Node) -> list[ir.Node] | None:
        spec = spec_of(node)
        if node.graph is None or not spec.is_linear or spec.accumulates:
            return None
        key = _shared(node)
        group = [linear for linear in node.graph if linear.op_type == node.op_type and _shared(linear) == key]
        return group if group[0] is node and len(group) > 1 else None

    def check(self, match: list[ir.Node]) -> str:
        for node in match:
            for operand, value in spec_of(node).operands(node):
                if operand.role not in OF_OUTPUTS or value is None:
                    continue
                if not is_weight(value):
                    return f"{value.name} of {node.name} is computed"
                readers = other_readers(value, node)
                if readers:
                    return f"{value.name} is also read by {', '.join(readers)} and would be stored twice"
        return ""

    def rewrite(self, match: list[ir.Node], graph: ir.Graph) -> Replacement:
        first, spec = match[0], spec_of(match[0])
        name = joined([str(node.name) for node in match])
        rows = [_tensor(spec.operand(node, Role.WEIGHT)).shape.numpy()[0] for node in match]
        inputs = [value for _, value in spec.operands(first)]
        for index, tensor in _stacked(match, rows).items():
            inputs[index] = value = make_initializer(tensor)
            graph.register_initializer(value)
        sizes = make_initializer(ir.Tensor(np.asarray(rows, np.int64), name=f"{name}.sizes"))
        graph.register_initializer(sizes)
        attributes = {key: attribute.value for key, attribute in first.attributes.items()}
        linear = make_node(first.op_type, inputs, name, attributes=attributes)
        split = make_node("Split", [linear.outputs[0], sizes], f"{name}.split", attributes={"axis": -1})
        parts = zip(match, split.outputs, strict=True)
        return Replacement(match, [linear, split], {node.outputs[0]: part for node, part in parts})


def joined(names: Sequence[str]) -> str:
    """Join names into one: the words that differ between the dots are joined by "+", so that h.0.q and h.0.k give h.0.q+k."""
    words = [name.split(".") for name in names]
    longest = min(map(len, words)) - 1
    head = next((i for i in range(longest) if len({word[i] for word in words}) > 1), longest)
    tail = next((i for i in range(longest - head) if len({word[-1 - i] for word in words}) > 1), longest - head)
    middle = "+".join(".".join(word[head : len(word) - tail]) for word in words)
    return ".".join([*words[0][:head], middle, *words[0][len(words[0]) - tail :]])


def _shared(linear: ir.Node) -> tuple[Any, ...]:
    """What linears must have in common apart from their op: attributes, and the inputs that are not the linear's constants."""
    values = (value for operand, value in spec_of(linear).operands(linear) if operand.role not in OF_OUTPUTS)
    return *values, attributes_of(linear)


def _tensor(value: ir.Value | None) -> ir.TensorProtocol:
    assert value is not None and value.const_value is not None
    return value.const_value


def _stacked(linears: Sequence[ir.Node], rows: Sequence[int]) -> dict[int, ir.LazyTensor]:
    """The stacked constants of linears, which have `rows` outputs each, by the index of the input.

    Weights, scales and zero points are read together, biases by themselves.
    """
    spec = spec_of(linears[0])
    columns: dict[int, list[ir.TensorProtocol]] = {}
    for index, operand in enumerate(spec.inputs):
        values = [spec.operand(linear, operand.role) for linear in linears]
        if operand.role in OF_OUTPUTS and any(value is not None for value in values):
            columns[index] = _column(values, [f"{linear.name}.{operand.name}" for linear in linears], rows)
    bias = spec.index(Role.BIAS)
    integers = [index for index in columns if index != bias]
    together = [integers, [bias]] if bias in columns else [integers]
    return {
        index: tensor
        for indices in together
        for index, tensor in zip(indices, _stack([columns[i] for i in indices]), strict=True)
    }


def _column(values: Sequence[ir.Value | None], names: Sequence[str], rows: Sequence[int]) -> list[ir.TensorProtocol]:
    """The tensors of one operand of linears, which have `rows` outputs each; zeros where a linear leaves the operand out."""
    first = next(_tensor(value) for value in values if value is not None)

    def zeros(name: str, count: int) -> ir.TensorProtocol:
        shape = count, *first.shape.numpy()[1:]
        return lazy(name, lambda: np.zeros(shape, first.dtype.numpy()), shape, first.dtype, step="zeros")

    return [
        zeros(name, count) if value is None else _tensor(value) for value, name, count in zip(values, names, rows, strict=True)
    ]


def _stack(columns: Sequence[Sequence[ir.TensorProtocol]]) -> list[ir.LazyTensor]:
    """Stack each column's tensors along axis 0. All columns are read together, part by part: a part's integers and scales
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
