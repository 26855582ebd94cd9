"""All that an export is written from: a graph, its modules by their names in Transformers, and what its source says besides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
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
from belle_compile.compiler.ir.lazy import has_rows, lazy, read_rows
from belle_compile.compiler.ir.ops import operand, spec_of
from belle_compile.compiler.ir.signature import Role
from belle_compile.passes.quantization.weights import nearest_blocks, rounded_weight
from belle_compile.runtime.artifact import GenerationDefaults

Array = npt.NDArray[Any]
Order = npt.NDArray[np.intp]

HEAD = "lm_head"
_CHUNK_BYTES = 64 << 20  # of float32 values in memory at a time, where rows can be read alone
_ROWS = 4096  # rows of a matrix that are rounded at a time
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
    """A model before or after it is transformed: its graph, and all else that an export is written from.

    `stated` is the config.json of a checkpoint, in the keys of Transformers; None for an engine, whose graph says as much.
    `float_dtype` is the type of tensors that keep floats; `special`, `template` and `generation` are those of `Checkpoint`.
    With `float_tables`, modules have floats in place of the integers of embedding and head. `copied` is the file of an engine
    that holds the weights as the format stores them; the tensors of `graph` have no values then.
    """

    name: str
    family: Family[Any]
    graph: ir.Model
    stated: Mapping[str, Any] | None
    float_dtype: str
    tokenizer_json: str
    special: Mapping[str, Any]
    template: PromptTemplate
    generation: GenerationDefaults
    float_tables: bool = False
    copied: Path | None = None

    @property
    def facts(self) -> dict[str, int]:
        """The dimensions by their names in the metadata of graphs and in manifests."""
        return {key: int(value) for key, value in self.graph.metadata_props.items() if value.isdecimal()}

    @property
    def release(self) -> Release:
        """The layout of the family's files in Transformers; raises CompileError for a family without one."""
        if self.family.release is None:
            found = "no layout of its files"
            raise CompileError(STAGE, f"family {self.family.title}", found=found, remedy="build an engine of it")
        return self.family.release

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The config.json of Transformers."""
        if self.stated is not None:
            return self.stated
        modules_of(self.graph.graph, self.release)  # refuses a graph for which there is none
        return self.release.config_of_graph(self.graph.graph, self.facts) | {"tie_word_embeddings": self.tied_head}

    @cached_property
    def dimensions(self) -> ModelConfig:
        """What `config` says."""
        dimensions: ModelConfig = self.family.read_config(self.config)
        return dimensions

    @cached_property
    def tied_head(self) -> bool:
        """Whether the table of the embedding is the head's weight; `modules` have no head then."""
        tables = (operand(node, Role.TABLE) for node in self.graph.graph)
        weights = [table for table in tables if table is not None and table.is_initializer()]
        return any(spec_of(user).is_linear for weight in weights for user, _ in weight.uses())

    @cached_property
    def modules(self) -> tuple[Module, ...]:
        """The modules in the order of the graph; raises CompileError for a graph that the architecture does not compute."""
        modules = modules_of(self.graph.graph, self.release)
        kept = [module for module in modules if not (module.is_head and self.tied_head)]
        return tuple(_with_float_table(module) if self.float_tables else module for module in kept)

    def check_head(self, format: str) -> None:
        """Raise CompileError for a head of its own where the runtimes of a format load none for the architecture."""
        if (reason := self.release.tied_only.get(format, "")) and not self.tied_head:
            raise CompileError(
                STAGE, f"format {format}", found=f"a head that is not the embedding in {self.name}",
                expected=f"one that is, since {reason}",
                remedy="use another --format, or, where a rotation gave an engine that head, export its checkpoint",
            )  # fmt: skip

    def module(self, name: str) -> Module:
        return next(module for module in self.modules if module.name == name)


def modules_of(graph: ir.Graph, release: Release) -> list[Module]:
    """The modules of a graph before fusion; raises CompileError for a graph that the family's architecture does not compute."""
    modules = []
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
        modules.append(Module(name, node.op_type, weight, None if bias is None else _tensor(bias), source_of(node)))
    return modules


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


def _with_float_table(module: Module) -> Module:
    """A module whose embedding table or head has floats in place of integers: their product with the scales."""
    if not isinstance(module.weight, Integers) or not (module.is_table or module.is_head):
        return module
    return replace(module, weight=_product(module.name, module.weight))


def _product(name: str, weight: Integers) -> ir.TensorProtocol:
    def compute() -> Array:
        product: Array = weight.integers.numpy() * weight.scales.numpy()[:, None].astype(np.float32)
        return product

    sources = [weight.integers, weight.scales]
    return lazy(f"{name}.float", compute, weight.shape, ir.DataType.FLOAT, step="dequantized", sources=sources)


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


def blocks_of(weight: ir.TensorProtocol, block: int, order: Order | None = None) -> Iterator[tuple[Array, Array]]:
    """For some rows of a float matrix at a time, in an `order` (None: its own): int8 integers [n, K] nearest to them, and
    float16 scales [n, G] of `block` inputs; see `nearest_blocks`."""
    done = 0
    for part in chunks(weight, order):
        for start in range(0, len(part), _ROWS):
            rows = np.ascontiguousarray(part[start : start + _ROWS], np.float32)
            yield nearest_blocks(rows, weight, done, block)
            done += len(rows)
