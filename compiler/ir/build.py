"""Makes nodes and graphs: output types follow from the shape rules of ops, and scopes prefix the names of nodes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.ir import ops
from belle_compile.compiler.ir.verify import INTERFACE, verify


def make_node(
    op: str,
    inputs: Sequence[ir.Value | None],
    name: str,
    *,
    outputs: Sequence[str] = (),
    attributes: Mapping[str, int | float | str] | None = None,
) -> ir.Node:
    """Make a node of a registered op. It belongs to no graph yet; the op's shape rule infers the types of its outputs.

    `outputs` are the names of its outputs. By default a single output has the node's name, and several have that name followed
    by ".<output>" (".0", ".1" for Split). Optional inputs at the end may be left out. Raises CompileError for an op that is not
    registered, and where inputs or attributes do not fit.
    """
    spec = ops.REGISTRY.get(op)
    if spec is None:
        raise CompileError("build", f"op {op}", node=name, expected="an op of compiler/ir/ops.py")
    given = list(inputs)
    while given and given[-1] is None:
        given.pop()
    attrs = [_attribute(key, value, spec) for key, value in (attributes or {}).items()]
    probe = ir.Node(spec.domain, op, given, attrs, name=name)
    try:
        specs = ops.infer_outputs(probe)
    finally:
        probe.resize_inputs(0)  # so that the probe is no longer a user of its inputs
    names = list(outputs) or ([name] if len(specs) == 1 else [f"{name}.{label}" for label in _labels(spec, len(specs))])
    assert len(names) == len(specs), f"{name}: {len(names)} names for {len(specs)} outputs"
    values = [
        ir.Value(name=label, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.dims))
        for label, tensor in zip(names, specs, strict=True)
    ]
    return ir.Node(spec.domain, op, given, attrs, outputs=values, name=name)


def make_initializer(tensor: ir.TensorProtocol, name: str | None = None) -> ir.Value:
    """Make a value that holds a weight, to be registered with `graph.register_initializer`."""
    return ir.Value(name=name or tensor.name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)  # type: ignore[arg-type]


def _attribute(name: str, value: int | float | str, spec: ops.OpSpec) -> ir.Attr:
    kind = spec.attributes[name].type if name in spec.attributes else type(value)
    if kind is float:
        return ir.AttrFloat32(name, float(value))
    return ir.AttrInt64(name, int(value)) if kind is int else ir.AttrString(name, str(value))


def _labels(spec: ops.OpSpec, count: int) -> list[str]:
    return [str(index) for index in range(count)] if spec.variadic else [operand.name for operand in spec.outputs]


@dataclass(frozen=True)
class StepInputs:
    """The inputs of every model's graph; see `verify.INTERFACE`."""

    token_ids: ir.Value
    positions: ir.Value
    sequences: ir.Value
    block_table: ir.Value
    logit_rows: ir.Value


class GraphBuilder:
    """Builds a graph that has the step's inputs, op by op.

    Example::

        b = GraphBuilder("bloom")
        x = b.op("Gather", b.weight("word_embeddings.weight", table), b.inputs.token_ids, name="word_embeddings")
        with b.scope("h.0"):
            x = b.op("LayerNormalization", x, scale, bias, name="input_layernorm", epsilon=1e-5)   # h.0.input_layernorm
        model = b.finish(logits, {"family": "bloom"})
    """

    def __init__(self, name: str = "model") -> None:
        inputs = [
            ir.Value(name=key, type=ir.TensorType(spec.dtype), shape=ir.Shape(spec.dims)) for key, spec in INTERFACE.items()
        ]
        self.inputs = StepInputs(*inputs)
        self.graph = ir.Graph(inputs, [], nodes=[], name=name, opset_imports={"": ops.ONNX_OPSET, ops.BELLE: ops.BELLE_OPSET})
        self._scopes: list[str] = []
        self._names: set[str] = set(INTERFACE)

    @contextlib.contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Prefix the names of nodes that are appended inside with `name` and a dot; scopes nest."""
        self._scopes.append(name)
        try:
            yield
        finally:
            self._scopes.pop()

    def weight(self, name: str, tensor: ir.TensorProtocol | npt.NDArray[Any]) -> ir.Value:
        """Return the initializer `name`, a full name to which scopes do not apply.

        The first call makes it from `tensor`. Later calls return the same initializer, so that tied weights share it.
        """
        known = self.graph.initializers.get(name)
        if known is not None:
            return known
        if isinstance(tensor, np.ndarray):
            tensor = ir.Tensor(tensor, name=name)
        value = make_initializer(tensor, name)
        self._claim(name)
        self.graph.register_initializer(value)
        return value

    def op(self, op: str, *inputs: ir.Value | None, name: str, **attributes: int | float | str) -> ir.Value:
        """Append an op that has one output; return the output."""
        (value,) = self.ops(op, *inputs, name=name, **attributes)
        return value

    def ops(self, op: str, *inputs: ir.Value | None, name: str, **attributes: int | float | str) -> tuple[ir.Value, ...]:
        """Append an op; return all its outputs."""
        node = make_node(op, inputs, ".".join([*self._scopes, name]), attributes=attributes)
        for value in node.outputs:
            self._claim(str(value.name))
        self.graph.append(node)
        return tuple(node.outputs)

    def split(self, x: ir.Value, sizes: Sequence[int], name: str) -> tuple[ir.Value, ...]:
        """Append a Split of the last axis; the sizes become an initializer."""
        parts = self.weight(".".join([*self._scopes, name, "sizes"]), np.asarray(sizes, np.int64))
        return self.ops("Split", x, parts, name=name, axis=-1)

    def finish(self, logits: ir.Value, metadata: Mapping[str, str] | None = None) -> ir.Model:
        """Make `logits` the graph's output, under that name; return the verified model."""
        logits.name = "logits"
        self.graph.outputs.append(logits)
        model = ir.Model(self.graph, ir_version=11, producer_name="belle-compile", metadata_props=dict(metadata or {}))
        verify(model)
        return model

    def _claim(self, name: str) -> None:
        if name in self._names:
            raise CompileError("build", f"value {name}", found="a second value of that name", expected="names that are unique")
        self._names.add(name)
