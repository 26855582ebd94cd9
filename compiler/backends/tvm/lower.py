"""Lowers a graph to a flat list of kernel calls over buffers, and the buffers to a memory plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from compiler.backends.tvm import packing
from compiler.backends.tvm.kernels.base import ROW_ALIGNMENT, Kernel, View, round_up
from compiler.backends.tvm.memory_plan import Lifetime, PlannedBuffer, plan_memory
from compiler.errors import CompileError
from compiler.ir.ops import attributes_of
from runtime.program import KV, AllReduce, Arena, Arg, Call, FusionCalls, Input, KVLayout, Logits, Program, Weight

Rows = Literal["T", "R"]
MAX_TOKENS = 512  # of one step; prompts beyond it are read in several
MAX_ROWS = 64  # rows of logits of one step
MAX_SEQUENCES = 64
_PLANES = {ir.DataType.INT8: 1, ir.DataType.INT16: 2}  # of quantized activations


@dataclass(frozen=True)
class PackedWeight:
    """A tensor of the engine; `pack` reads its source and lays it out, nothing is kept."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pack: Callable[[], npt.NDArray[Any]]

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


@dataclass(eq=False)
class Buffer:
    """Rows of activations; its place in the arena comes from the memory plan."""

    rows: Rows
    stride: int  # elements from row to row
    dtype: str

    @property
    def bytes(self) -> int:
        rows = MAX_TOKENS if self.rows == "T" else MAX_ROWS
        return rows * self.stride * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Place:
    """Where a value lies: a buffer, from an element of each row on."""

    buffer: Buffer
    offset: int
    width: int
    planes: int = 1  # parts of a row, one after the other: two for the bytes of 16-bit activations

    @property
    def view(self) -> View:
        return View(self.buffer.stride, self.offset)


Operand = Place | Arg


@dataclass(frozen=True)
class PendingCall:
    """A call whose buffers have no addresses yet; one without a kernel is a sum over ranks of the one operand's rows."""

    kernel: Kernel | None
    node: str
    rows: Rows
    operands: tuple[Operand, ...]


@dataclass
class Lowering:
    """What the rules in `rules.py` append to; one per graph."""

    model: ir.Model
    kv_dtype: str
    num_layers: int
    max_blocks: int
    places: dict[ir.Value, Place] = field(default_factory=dict)
    weights: dict[str, PackedWeight] = field(default_factory=dict)
    calls: list[PendingCall] = field(default_factory=list)

    def place(self, value: ir.Value | None) -> Place:
        """Where an activation lies."""
        assert value is not None
        if value not in self.places:
            raise CompileError("tvm", f"value {value.name}", found="used before it is computed", expected="a node's output")
        return self.places[value]

    def allocate(self, value: ir.Value) -> Place:
        """A new buffer for a node's output. Per-token scales have stride 1.

        Quantized activations are uint8 = int8 + 128; those of 16 bits are two such planes, each padded like a row.
        """
        assert value.shape is not None
        rows, *rest = value.shape
        symbol = rows.value if isinstance(rows, ir.SymbolicDim) else rows
        if symbol not in ("T", "R"):
            raise CompileError("tvm", f"value {value.name}", found=f"rows {symbol}", expected="T or R")
        width = rest[0] if rest else 1
        assert isinstance(width, int), "only rows are symbolic"
        planes = _PLANES.get(value.dtype) if value.dtype else None
        stride = (planes or 1) * round_up(width, ROW_ALIGNMENT) if rest else 1
        buffer = Buffer("T" if symbol == "T" else "R", stride, "uint8" if planes else "float32")
        place = Place(buffer, 0, width, planes or 1)
        self.places[value] = place
        return place

    def call(self, kernel: Kernel, node: ir.Node, rows: Rows, *operands: Operand) -> None:
        """Append a call; operands follow the row count in the order of `kernel.pointers()`."""
        expected = len(kernel.pointers())
        if len(operands) + 1 != expected:
            raise CompileError("tvm", f"kernel {kernel.name}", found=f"{len(operands) + 1} arguments", expected=str(expected))
        self.calls.append(PendingCall(kernel, str(node.name), rows, (Input(rows), *operands)))

    def all_reduce(self, node: ir.Node, place: Place) -> None:
        """Append a sum over ranks, in place."""
        assert not place.offset, "rows of a part are not summed"
        self.calls.append(PendingCall(None, str(node.name), place.buffer.rows, (place,)))

    # Weights, by initializer; asking twice gives the same tensor, so tied weights are stored once.

    def vector(self, value: ir.Value | None) -> Weight:
        """A float32 vector, padded to whole registers."""
        tensor, name = _tensor(value)
        size = round_up(tensor.shape.numpy()[0], packing.VECTOR_ALIGNMENT)
        return self._weight(name, "float32", (size,), lambda: packing.pack_vector(tensor.numpy()))

    def number(self, value: ir.Value | None) -> Weight:
        """One int32, padded like a vector."""
        tensor, name = _tensor(value)
        return self._weight(name, "int32", (packing.VECTOR_ALIGNMENT,), lambda: packing.pack_vector(tensor.numpy()))

    def int8_panels(self, value: ir.Value | None) -> Weight:
        """int8 [outputs, inputs] in panels."""
        tensor, name = _tensor(value)
        shape = packing.int8_panels_shape(*_matrix(tensor))
        return self._weight(name, "int8", shape, lambda: packing.pack_int8(tensor.numpy()))

    def correction(self, value: ir.Value | None) -> Weight:
        """int32 [outputs]: what int8 + 128 activations add to the sums."""
        tensor, name = _tensor(value)
        size = round_up(tensor.shape.numpy()[0], packing.VECTOR_ALIGNMENT)
        return self._weight(
            f"{name}.correction", "int32", (size,), lambda: packing.pack_vector(packing.correction(tensor.numpy()))
        )

    def int4_panels(self, value: ir.Value | None) -> Weight:
        """int4 [outputs, inputs] in panels, two weights a byte."""
        tensor, name = _tensor(value)
        shape = packing.int4_panels_shape(*_matrix(tensor))
        return self._weight(name, "uint8", shape, lambda: packing.pack_int4(tensor.numpy().astype(np.int8)))

    def group_scales(self, value: ir.Value | None) -> Weight:
        """float16 [outputs, groups] in panels."""
        tensor, name = _tensor(value)
        shape = packing.group_scales_shape(*_matrix(tensor))
        return self._weight(name, "float16", shape, lambda: packing.pack_group_scales(tensor.numpy()))

    def float_panels(self, value: ir.Value | None) -> Weight:
        """float32 [outputs, inputs] in panels."""
        tensor, name = _tensor(value)
        shape = packing.float_panels_shape(*_matrix(tensor))
        return self._weight(name, "float32", shape, lambda: packing.pack_float(tensor.numpy()))

    def _weight(self, name: str, dtype: str, shape: tuple[int, ...], pack: Callable[[], npt.NDArray[Any]]) -> Weight:
        known = self.weights.setdefault(name, PackedWeight(name, dtype, shape, pack))
        if (known.dtype, known.shape) != (dtype, shape):
            raise CompileError("tvm", f"weight {name}", found=f"two layouts, {known.shape} and {shape}", expected="one")
        return Weight(name)


def _tensor(value: ir.Value | None) -> tuple[ir.TensorProtocol, str]:
    if value is None or value.const_value is None:
        raise CompileError("tvm", f"weight {value.name if value else ''}", found="a computed value", expected="an initializer")
    return value.const_value, str(value.name)


def _matrix(tensor: ir.TensorProtocol) -> tuple[int, int]:
    outputs, inputs = tensor.shape.numpy()
    return outputs, inputs


def lower(
    model: ir.Model, calls_before_fusion: int, kv_cache: str = "auto"
) -> tuple[Program, list[PackedWeight], list[Kernel], list[PlannedBuffer]]:
    """The program, the weights in the order of their first use, the kernels and the buffers of a graph.

    `kv_cache` is the type of the KV cache; "auto" is float16 with quantized linear layers, else float32.
    """
    from compiler.backends.tvm.rules import RULES

    metadata = model.metadata_props
    quantized = any(node.op_type in ("QuantizedLinear", "IntegerLinear", "GroupQuantizedLinear") for node in model.graph)
    kv_dtype = ("float16" if quantized else "float32") if kv_cache == "auto" else kv_cache
    layers, kv_heads, head_dim = (int(metadata[key]) for key in ("num_layers", "num_kv_heads", "head_dim"))
    lowering = Lowering(model, kv_dtype, layers, -(-int(metadata["max_position"]) // 16))
    for node in model.graph:
        rule = RULES.get(node.op_type)
        if rule is None:
            raise CompileError(
                "tvm", f"op {node.op_type}", node=str(node.name), found="no kernel", expected=", ".join(sorted(RULES)),
                remedy="run the fuse passes or add a rule to compiler/backends/tvm/rules.py",
            )  # fmt: skip
        rule(lowering, node, attributes_of(node))
    logits = lowering.place(model.graph.outputs[0])
    buffers, arena_bytes = _place_buffers(lowering.calls, logits.buffer)
    offsets = {buffer: planned.offset for buffer, planned in buffers.items()}
    calls = tuple(_finish(call, offsets, lowering.weights) for call in lowering.calls)
    facts = {key: int(metadata.get(key, 0)) for key in ("rank", "ranks", "vocab_size", "first_token")}
    ranks = facts["ranks"] or 1
    program = Program(
        max_tokens=MAX_TOKENS,
        max_rows=MAX_ROWS,
        max_sequences=MAX_SEQUENCES,
        max_blocks=lowering.max_blocks,
        arena_bytes=arena_bytes,
        vocab_size=facts["vocab_size"] if ranks > 1 else logits.width,
        logits=Logits(offsets[logits.buffer], logits.buffer.stride, facts["first_token"], logits.width),
        kv=KVLayout(layers, kv_heads, head_dim, lowering.kv_dtype),
        calls=calls,
        kernel_calls=FusionCalls(calls_before_fusion, len(calls)),
        rank=facts["rank"],
        ranks=ranks,
    )
    kernels = list({call.kernel: None for call in lowering.calls if call.kernel})
    read = dict.fromkeys(arg.name for call in calls for arg in call.args if isinstance(arg, Weight))
    return program, [lowering.weights[name] for name in read], kernels, list(buffers.values())


def _buffers(call: PendingCall) -> Iterable[Buffer]:
    return (operand.buffer for operand in call.operands if isinstance(operand, Place))


def _place_buffers(calls: list[PendingCall], logits: Buffer) -> tuple[dict[Buffer, PlannedBuffer], int]:
    spans: dict[Buffer, tuple[int, int]] = {}
    for index, call in enumerate(calls):
        for buffer in _buffers(call):
            spans[buffer] = (spans.get(buffer, (index, index))[0], index)
    spans[logits] = (spans[logits][0], len(calls))
    plan = plan_memory([Lifetime(buffer.bytes, first, last) for buffer, (first, last) in spans.items()])
    placed = zip(spans.items(), plan.offsets, strict=True)
    planned = {
        buffer: PlannedBuffer(calls[first].node, offset, buffer.bytes, first, last)
        for (buffer, (first, last)), offset in placed
    }
    return planned, plan.arena_bytes


def _finish(call: PendingCall, offsets: dict[Buffer, int], weights: dict[str, PackedWeight]) -> Call:
    args = tuple(Arena(offsets[op.buffer]) if isinstance(op, Place) else op for op in call.operands)
    if call.kernel is None:
        (place,) = (operand for operand in call.operands if isinstance(operand, Place))
        summed = AllReduce(place.width, place.buffer.stride)
        return Call(kind="all_reduce", node=call.node, rows=call.rows, args=args, all_reduce=summed)
    read = sum(weights[arg.name].bytes for arg in args if isinstance(arg, Weight))
    if "embedding" in call.kernel.kind:
        read = 0  # one row per token, not the table
    return Call(kind=call.kernel.kind, node=call.node, rows=call.rows, args=args, kernel=call.kernel.name, bytes=read)


def cache_parts(layer: int) -> tuple[KV, KV]:
    """The key and the value cache of a layer as arguments."""
    return KV(layer, "k"), KV(layer, "v")
