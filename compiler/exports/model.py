"""The modules of a transformed graph by their names in Transformers, and all else that an export is written from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from belle_compile.compiler.checkpoint.templates import PromptTemplate
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.exports.directory import STAGE
from belle_compile.compiler.families.family import Family
from belle_compile.compiler.families.model_config import ModelConfig
from belle_compile.compiler.families.release import Release
from belle_compile.compiler.ir.lazy import has_rows, read_rows
from belle_compile.compiler.ir.ops import operand, spec_of
from belle_compile.compiler.ir.signature import Role
from belle_compile.passes.quantization.weights import quantize_groups, rounded_weight
from belle_compile.runtime.artifact import GenerationDefaults

Array = npt.NDArray[Any]
Order = npt.NDArray[np.intp]

HEAD = "lm_head"
_CHUNK_BYTES = 64 << 20  # of float32 values in memory at a time, where rows can be read alone
_STREAM_NORMS = ("LayerNormalization", "RMSNormalization")
_NORMS = (*_STREAM_NORMS, "HeadNorm")
# Ops that every architecture has around its modules.
_PLAIN = frozenset({"Gather", "Split", "Add", "Gelu", "SwiGLU", "RotaryTable", "Attention", "QuantizeTokens", "IntegerLinear"})


@dataclass(frozen=True)
class Integers:
    """A weight as int8 `integers` [N, K] and `scales`: float32 [N], or float16 [N, G] for groups of inputs."""

    integers: ir.TensorProtocol
    scales: ir.TensorProtocol

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.integers.shape.numpy())


@dataclass(frozen=True)
class Module:
    """A linear, a norm or an embedding table under its name in the graph; `op` is that of its node, and `source` the op that
    computes what a linear reads (empty for others).

    A `weight` has one of two forms. `bias` is None where there is none.
    """

    name: str
    op: str
    weight: ir.TensorProtocol | Integers
    bias: ir.TensorProtocol | None = None
    source: str = ""

    @property
    def is_norm(self) -> bool:
        return self.op in _NORMS

    @property
    def is_head(self) -> bool:
        return self.name == HEAD

    @property
    def is_table(self) -> bool:
        return self.op in ("Gather", "QuantizedEmbedding")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape if isinstance(self.weight, Integers) else tuple(self.weight.shape.numpy())


@dataclass(frozen=True)
class ExportedModel:
    """A transformed model: its modules in the order of the graph, and what its checkpoint says besides.

    `config` is a config.json in the keys of Transformers; `float_dtype` is the type of tensors that keep floats; `special`,
    `template` and `generation` are those of `Checkpoint`. With `tied_head` the table of the embedding is the head's weight, and
    `modules` has no head.
    """

    name: str
    family: Family[Any]
    config: Mapping[str, Any]
    dimensions: ModelConfig
    modules: tuple[Module, ...]
    tied_head: bool
    float_dtype: str
    tokenizer_json: str
    special: Mapping[str, Any]
    template: PromptTemplate
    generation: GenerationDefaults

    @property
    def release(self) -> Release:
        return release_of(self.family)

    def module(self, name: str) -> Module:
        return next(module for module in self.modules if module.name == name)


def release_of(family: Family[Any]) -> Release:
    """The layout of a family's files in Transformers; raises CompileError for a family without one."""
    if family.release is None:
        raise CompileError(STAGE, f"family {family.title}", found="no layout of its files", remedy="build an engine of it")
    return family.release


def modules_of(graph: ir.Graph, release: Release) -> tuple[tuple[Module, ...], bool]:
    """The modules of a graph before fusion, and whether its head is tied; raises CompileError for a graph that the family's
    architecture does not compute."""
    modules: dict[str, Module] = {}
    weights: dict[str, ir.Value] = {}
    for node in graph:
        read = _weight_of(node)
        if read is None:
            if node.op_type not in _PLAIN:
                raise _other_architecture(node)
            continue
        values, bias = read
        if node.op_type in _STREAM_NORMS and node.op_type != release.norm:
            raise _other_architecture(node)
        name = str(node.name)
        if name == HEAD and bias is not None:
            raise _other_architecture(node)
        tensors = rounded_weight(values[0]) or [_tensor(value) for value in values]
        weight = Integers(*tensors) if len(tensors) > 1 else tensors[0]
        modules[name] = Module(name, node.op_type, weight, None if bias is None else _tensor(bias), source_of(node))
        weights[name] = values[0]
    tied = any(module.is_table and weights[name] is weights[HEAD] for name, module in modules.items())
    if tied:
        del modules[HEAD]
    return tuple(modules.values()), tied


def source_of(linear: ir.Node) -> str:
    """The op that computes the activation which a linear reads, before it is rounded; empty for a node that is no linear."""
    accumulator = operand(linear, Role.ACCUMULATOR)
    multiply = linear if accumulator is None else accumulator.producer()
    read = None if multiply is None else operand(multiply, Role.ACTIVATION)
    source = None if read is None else read.producer()
    if source is not None and source.op_type == "QuantizeTokens":
        source = source.inputs[0].producer() if source.inputs[0] is not None else None
    return source.op_type if source is not None else ""


def _weight_of(node: ir.Node) -> tuple[tuple[ir.Value, ...], ir.Value | None] | None:
    """The values of a module's weight (one of floats, or integers and scales) and of its bias; None for a node without."""
    bias, spec = operand(node, Role.BIAS), spec_of(node)
    if spec.scales_sums:
        source = operand(node, Role.ACCUMULATOR)
        multiply = source.producer() if source is not None else None
        integers = operand(multiply, Role.WEIGHT) if multiply is not None else None
        scales = operand(node, Role.SCALE)
        assert integers is not None and scales is not None, "QuantizeLinears makes both"
        return (integers, scales), bias
    if spec.is_float_linear:
        weight = operand(node, Role.WEIGHT)
    elif node.op_type in _NORMS:
        weight = operand(node, Role.GAIN)
    else:
        weight = operand(node, Role.TABLE)
    if weight is None or not weight.is_initializer():
        return None
    scales = operand(node, Role.SCALE)
    return ((weight,) if scales is None else (weight, scales)), bias


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    assert value.const_value is not None, f"{value.name} is a weight"
    return value.const_value


def _other_architecture(node: ir.Node) -> CompileError:
    return CompileError(
        STAGE,
        f"the graph at {node.name}",
        found=f"the op {node.op_type}, which the architecture does not have there",
        expected="the model's own architecture",
        remedy="export its checkpoint, whose rotations keep the architecture, or an engine built with --methods gptq",
    )


def chunks(tensor: ir.TensorProtocol, order: Order | None = None) -> Iterator[Array]:
    """The rows of a tensor in an `order` (None: its own), a part at a time where it can be computed by rows."""
    shape = tensor.shape.numpy()
    if order is not None or not has_rows(tensor) or len(shape) < 2:
        array = tensor.numpy()
        yield array if order is None else array[order]
        return
    step = max(1, _CHUNK_BYTES // (4 * shape[1]))
    for start in range(0, shape[0], step):
        yield read_rows(tensor, start, min(start + step, shape[0]))


def nearest_integers(rows: Array, name: str, block: int) -> tuple[Array, Array]:
    """int8 integers [N, K] nearest to the rows of a float matrix, and float16 scales [N, G] of `block` inputs with the least
    squared error. Raises CompileError where the matrix `name` holds NaN, infinity or a value too large for such a scale."""
    return quantize_groups(rows, name, block, bits=8)
