"""A graph of standard ONNX under construction, whose large constants lie in an engine's weights.safetensors.

ONNX allows a file of external data to be any file: the offsets of its tensors are in the model. So weights.safetensors, which
every engine has, is also the external data of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import onnx_ir as ir

from belle_compile.compiler.backends.base import ITEM_BYTES, Array
from belle_compile.compiler.backends.weights_header import weights_header
from belle_compile.runtime.program import ALIGNMENT, WEIGHTS_NAME

OPSET = 23  # the newest whose ops, as far as they are used here, run on ONNX Runtime's CPU and CUDA providers
MICROSOFT = "com.microsoft"  # domain of the ops that only ONNX Runtime has; they have one version
IR_VERSION = 11

Dims = Sequence[int | str]
DTYPES = {
    "float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "int8": ir.DataType.INT8, "int32": ir.DataType.INT32,
    "int64": ir.DataType.INT64,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """A constant that weights.safetensors holds in C order, as one row that is padded with zeros to whole cache lines.

    `dims` is its shape in the model. `compute` is called when it is written. Tensors with the same `source` are computed from
    the same weight, and are stored next to each other so that it is read once.
    """

    name: str
    dtype: str
    dims: tuple[int, ...]
    compute: Callable[[], Array]
    source: str

    @property
    def data_bytes(self) -> int:
        """The size of the values without padding."""
        return prod(self.dims) * ITEM_BYTES[self.dtype]

    @property
    def shape(self) -> tuple[int, ...]:
        return (-(-self.data_bytes // ALIGNMENT) * ALIGNMENT // ITEM_BYTES[self.dtype],)

    def pack(self) -> Array:
        """The values of the row."""
        row = np.zeros(self.shape, self.dtype)
        row[: prod(self.dims)] = self.compute().reshape(-1)
        return row


@dataclass(frozen=True)
class OnnxModel:
    """A complete model: the bytes of the ONNX file, the tensors of weights.safetensors in their order, and the dimensions of
    inputs by name."""

    content: bytes
    weights: Sequence[StoredTensor]
    inputs: Mapping[str, Dims]


class OnnxGraph:
    """Appends inputs, constants and nodes; names must be unique. Types are stated for inputs and outputs only, since ONNX
    infers the others."""

    def __init__(self, name: str, opset: int = OPSET) -> None:
        self._graph = ir.Graph([], [], nodes=[], name=name, opset_imports={"": opset, MICROSOFT: 1})
        self._stored: dict[str, StoredTensor] = {}
        self._constants: dict[str, ir.Value] = {}

    def input(self, name: str, dtype: str, dims: Dims) -> ir.Value:
        """Append an input of the model; a dimension that is not fixed is a name."""
        value = _typed(name, dtype, dims)
        self._graph.inputs.append(value)
        return value

    def shared_input(self, name: str, dtype: str, dims: Dims) -> ir.Value:
        """The input of that name, which is appended when it is asked for first."""
        return next((value for value in self._graph.inputs if value.name == name), None) or self.input(name, dtype, dims)

    def output(self, value: ir.Value, name: str, dtype: str, dims: Dims) -> None:
        """Make a value an output of the model, under that name."""
        value.name, value.type, value.shape = name, ir.TensorType(DTYPES[dtype]), ir.Shape(dims)
        self._graph.outputs.append(value)

    def op(
        self, op: str, *inputs: ir.Value | None, name: str, domain: str = "", **attributes: int | float | str | list[int]
    ) -> ir.Value:
        """Append a node with one output, which has the node's name; return the output."""
        (value,) = self.ops(op, *inputs, outputs=[name], domain=domain, **attributes)
        return value

    def ops(
        self,
        op: str,
        *inputs: ir.Value | None,
        outputs: Sequence[str],
        domain: str = "",
        **attributes: int | float | str | list[int],
    ) -> list[ir.Value]:
        """Append a node; return its outputs. The first of their names is also the node's; one that is empty leaves it out."""
        given = list(inputs)
        while given and given[-1] is None:
            given.pop()
        values = [ir.Value(name=output) for output in outputs]
        node = ir.Node(domain, op, given, _attributes(attributes), outputs=values, name=outputs[0])
        self._graph.append(node)
        return values

    def constant(self, name: str, array: Array | list[int] | int | float, dtype: str) -> ir.Value:
        """A small constant, which is stored in the model itself; the same name stands for the same one."""
        if name not in self._constants:
            value = ir.Value(name=name, const_value=ir.Tensor(np.asarray(array, dtype), name=name))
            self._constants[name] = self._register(value, value.const_value)
        return self._constants[name]

    def weight(self, tensor: StoredTensor) -> ir.Value:
        """A constant in weights.safetensors; the same name stands for the same one."""
        if tensor.name not in self._stored:
            self._stored[tensor.name] = tensor
            self._constants[tensor.name] = ir.Value(name=tensor.name)
        return self._constants[tensor.name]

    def finish(self, metadata: Mapping[str, str]) -> OnnxModel:
        """The complete model; the same graph gives the same bytes."""
        weights = _by_source(self._stored.values())
        offset = len(weights_header(weights)) if weights else 0
        for tensor in weights:
            data = ir.ExternalTensor(
                WEIGHTS_NAME, offset=offset, length=tensor.data_bytes, dtype=DTYPES[tensor.dtype], shape=ir.Shape(tensor.dims),
                name=tensor.name,
            )  # fmt: skip
            self._register(self._constants[tensor.name], data)
            offset += prod(tensor.shape) * ITEM_BYTES[tensor.dtype]
        model = ir.Model(self._graph, ir_version=IR_VERSION, producer_name="belle-compile", metadata_props=dict(metadata))
        content: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
        inputs = {str(value.name): _dims(value) for value in self._graph.inputs}
        return OnnxModel(content, weights, inputs)

    def _register(self, value: ir.Value, tensor: ir.TensorProtocol | None) -> ir.Value:
        assert tensor is not None
        value.const_value, value.type, value.shape = tensor, ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
        self._graph.register_initializer(value)
        return value


def _dims(value: ir.Value) -> Dims:
    assert value.shape is not None
    return [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape]


def _typed(name: str, dtype: str, dims: Dims) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(DTYPES[dtype]), shape=ir.Shape(dims))


def _attributes(values: Mapping[str, int | float | str | list[int]]) -> list[ir.Attr]:
    kinds: dict[type, Callable[..., ir.Attr]] = {
        int: ir.AttrInt64, float: ir.AttrFloat32, str: ir.AttrString, list: ir.AttrInt64s
    }  # fmt: skip
    return [kinds[type(value)](name, value) for name, value in values.items()]


def _by_source(tensors: Iterable[StoredTensor]) -> list[StoredTensor]:
    """Tensors in the order of their first use, those of one source together."""
    groups: dict[str, list[StoredTensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.source, []).append(tensor)
    return [tensor for group in groups.values() for tensor in group]
