"""The state of a translation into standard ONNX: the graph so far, and what stands for each value of the source."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from belle_compile.compiler.backends.base import Array
from belle_compile.compiler.backends.onnx.graph import OPSET, Dims, OnnxGraph, OnnxModel, StoredTensor
from belle_compile.compiler.backends.onnx.interface import Interface
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.ir.ops import attributes_of
from belle_compile.compiler.ir.signature import TensorSpec
from belle_compile.runtime.program import BLOCK_SIZE
from belle_compile.runtime.serving.kv_blocks import blocks_for

STAGE = "onnx"
Attributes = dict[str, Any]
Rule = Callable[[Any, ir.Node, Attributes], None]  # of a Translation, or of the subclass that its backend uses


@dataclass(frozen=True)
class TokenScale:
    """The scales of quantized activations. The scale of a token is `factor` times the number in `rows` [B, S, 1], or `factor`
    alone where `rows` is None: `factor` goes into the scales of weights. `factor` computes a number."""

    rows: ir.Value | None
    factor: Callable[[], float]
    name: str


@dataclass(frozen=True)
class Planes:
    """Integers of activations with 16 bits, as uint8 values that are 128 too large: an integer is 256 * high + low."""

    high: ir.Value
    low: ir.Value


class Translation:
    """The state of one translation: the graph so far, and what stands for each value of the source.

    `values` maps values of the source to those of the result, `scales` the scales of activations, and `planes` integers of 16
    bits.
    """

    def __init__(self, source: ir.Model, interface: Interface, opset: int = OPSET, floats: str = "float32") -> None:
        """`floats` is the type of weights, activations, keys and values that are no integers."""
        self.source, self.interface, self.floats = source, interface, floats
        self.kv_floats = floats  # that of keys and values, where it differs
        self.facts = source.metadata_props
        self.graph = OnnxGraph(str(source.graph.name), opset)
        dynamic = "dynamic_rope_from" in self.facts
        self.step = interface.begin(self.graph, dynamic)
        self.values: dict[ir.Value, ir.Value] = {}
        self.scales: dict[ir.Value, TokenScale] = {}
        self.planes: dict[ir.Value, Planes] = {}
        self.signed: set[ir.Value] = set()  # inputs of rotations whose signs are in the scales of a linear before them
        self.skipped: set[ir.Node] = set()  # nodes that a rule has translated together with another one
        self.presents: list[tuple[ir.Value, str, Dims]] = []  # keys and values of the layers: value, name, dimensions
        self.shared: dict[str, ir.Value] = {}  # values that nodes of all layers read, by name
        self.rotations: dict[ir.Node, tuple[ir.Value, ir.Value]] = {}  # cosines and sines of each token, by RotaryTable

    def value(self, value: ir.Value | None) -> ir.Value:
        """What stands for a computed value of the source."""
        assert value is not None
        return self.values[value]

    def fact(self, name: str) -> int:
        """A number of the model's metadata."""
        return int(self.facts[name])

    @property
    def positions(self) -> int:
        """The positions that tables by position have: one block more than the longest sequence needs, because the executor may
        compute a token behind the last one."""
        return (blocks_for(self.fact("max_position")) + 1) * BLOCK_SIZE

    def number(self, name: str, value: float) -> ir.Value:
        """A float32 scalar."""
        return self.graph.constant(name, value, "float32")

    def stored(
        self, tensor: ir.TensorProtocol, dtype: str = "", source: str = "", dims: tuple[int, ...] | None = None
    ) -> ir.Value:
        """A weight as it is, or with the shape `dims`; by default of the type `floats`. `source` is that of `StoredTensor`, by
        default the weight itself."""
        name = str(tensor.name)
        shape = tuple(tensor.shape.numpy()) if dims is None else dims
        return self.graph.weight(StoredTensor(name, dtype or self.floats, shape, lambda: tensor.numpy(), source or name))

    def matrix(self, tensor: ir.TensorProtocol, dtype: str, unit: int = 1) -> ir.Value:
        """The weight of a linear, [inputs, outputs] in place of [outputs, inputs], with zeros up to a multiple of `unit`
        outputs."""
        name, (outputs, inputs) = str(tensor.name), tensor.shape.numpy()
        more = -outputs % unit
        dims = inputs, outputs + more
        return self.graph.weight(
            StoredTensor(f"{name}.transposed", dtype, dims, lambda: transposed(tensor.numpy(), more), name)
        )

    def refuse(self, node: ir.Node, found: str, remedy: str = "") -> CompileError:
        """The error of a node that has no translation."""
        return CompileError(STAGE, f"op {node.op_type}", node=str(node.name), found=found, remedy=remedy)

    def run(self, rules: Mapping[str, Rule]) -> OnnxModel:
        """Translate all ops, each by its rule; raises CompileError for an op that has none."""
        for node in self.source.graph:
            if node in self.skipped:
                continue
            rule = rules.get(node.op_type)
            if rule is None:
                raise self.refuse(node, "no translation")
            rule(self, node, attributes_of(node))
        return self.finish(self.value(self.source.graph.outputs[0]))

    def finish(self, logits: ir.Value) -> OnnxModel:
        """The complete model."""
        dims: Dims = [*self.interface.logits_dims, width_of(self.source.graph.outputs[0])]
        self.graph.output(logits, "logits", "float32", dims)
        for value, name, kv_dims in self.presents:
            self.graph.output(value, name, self.kv_floats, kv_dims)
        return self.graph.finish(self.facts)


def tensor_of(value: ir.Value | None) -> ir.TensorProtocol:
    """The tensor of a weight."""
    assert value is not None and value.const_value is not None
    return value.const_value


def transposed(matrix: Array, more: int = 0) -> Array:
    """A copy of the transposed matrix in C order, with `more` columns of zeros."""
    return np.pad(matrix.T, ((0, 0), (0, more))) if more else np.ascontiguousarray(matrix.T)


def width_of(value: ir.Value | None) -> int:
    """The width of activations [T, width] of the source."""
    assert value is not None
    width = TensorSpec.of(value).dims[-1]
    assert isinstance(width, int), "only rows are symbolic"
    return width
