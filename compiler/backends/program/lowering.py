"""Lowers a graph to a flat list of kernel calls over buffers, and the buffers to a memory plan; what backends share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from belle_compile.compiler.backends.program.kernel import ROW_ALIGNMENT, Kernel, View, round_up
from belle_compile.compiler.backends.program.memory_plan import Lifetime, PlannedBuffer, plan_memory
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.ir.ops import attributes_of
from belle_compile.runtime.program import (
    KV,
    AllReduce,
    Arena,
    Arg,
    Call,
    Candidates,
    FusionCalls,
    Input,
    KVLayout,
    Logits,
    Program,
    Scratch,
    Weight,
    When,
)

Rows = Literal["T", "R"]
VECTOR_ALIGNMENT = 16  # 64 bytes of float32 or int32
_PLANES = {ir.DataType.INT8: 1, ir.DataType.INT16: 2}  # of quantized activations
_SCRATCH_ALIGNMENT = 256


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


@dataclass(frozen=True)
class StepSizes:
    """What a step has at most; longer prompts are read in several."""

    tokens: int
    rows: int  # of logits
    sequences: int

    def most(self, rows: Rows) -> int:
        """Rows of activations of a kind."""
        return self.tokens if rows == "T" else self.rows


@dataclass(eq=False)
class Buffer:
    """`most` rows of activations, or the workspace of one call; its place in the arena comes from the memory plan."""

    rows: Rows
    most: int
    stride: int  # elements from row to row
    dtype: str

    @property
    def bytes(self) -> int:
        return self.most * self.stride * np.dtype(self.dtype).itemsize


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
    when: When = "always"


@dataclass(frozen=True)
class Kernels:
    """The kernels of a backend, by what rules.py makes of them: classes that take the same fields."""

    FloatLinear: Callable[..., Kernel]
    QuantizedLinear: Callable[..., Kernel]
    FloatEmbedding: Callable[..., Kernel]
    QuantizedEmbedding: Callable[..., Kernel]
    Norm: Callable[..., Kernel]
    Activation: Callable[..., Kernel]
    BlockHadamard: Callable[..., Kernel]
    QuantizeTokens: Callable[..., Kernel]
    RotaryTable: Callable[..., Kernel]
    Add: Callable[..., Kernel]
    GatherRows: Callable[..., Kernel]
    AppendKV: Callable[..., Kernel]
    # What attends, each for the tokens that it is for
    Attention: Sequence[tuple[When, Callable[..., Kernel]]]
    GroupLinear: Callable[..., Kernel] | None = None


@dataclass
class Lowering(ABC):
    """What the rules in `rules.py` append to; one per graph."""

    backend: ClassVar[str]
    kernels: ClassVar[Kernels]
    byte: ClassVar[str]  # of quantized activations
    sizes: ClassVar[StepSizes]
    half: ClassVar[str]  # the type of a KV cache of 16 bits

    model: ir.Model
    kv_dtype: str
    num_layers: int
    max_blocks: int
    places: dict[ir.Value, Place] = field(default_factory=dict)
    weights: dict[str, PackedWeight] = field(default_factory=dict)
    calls: list[PendingCall] = field(default_factory=list)
    scratch_bytes: int = 0

    def place(self, value: ir.Value | None) -> Place:
        """Where an activation lies."""
        assert value is not None
        if value not in self.places:
            what = f"value {value.name}"
            raise CompileError(self.backend, what, found="used before it is computed", expected="a node's output")
        return self.places[value]

    def allocate(self, value: ir.Value) -> Place:
        """A new buffer for a node's output. Per-token scales have stride 1.

        Quantized activations are bytes; those of 16 bits are two such planes, each padded like a row.
        """
        assert value.shape is not None
        rows, *rest = value.shape
        symbol = _rows(rows)
        if symbol is None:
            raise CompileError(self.backend, f"value {value.name}", found=f"rows {rows}", expected="T or R")
        width = rest[0] if rest else 1
        assert isinstance(width, int), "only rows are symbolic"
        planes = _PLANES.get(value.dtype) if value.dtype else None
        dtype = self.byte if planes else "float32"
        stride = (planes or 1) * self.row_stride(width, dtype) if rest else 1
        place = Place(self.buffer(symbol, stride, dtype), 0, width, planes or 1)
        self.places[value] = place
        return place

    def row_stride(self, width: int, dtype: str) -> int:
        """Elements from a row, or plane of one, to the next."""
        return round_up(width, ROW_ALIGNMENT)

    def buffer(self, rows: Rows, stride: int, dtype: str) -> Buffer:
        """Room for the rows of a step."""
        return Buffer(rows, self.sizes.most(rows), stride, dtype)

    def call(self, kernel: Kernel, node: ir.Node, rows: Rows, *operands: Operand, when: When = "always") -> None:
        """Append a call; operands follow the row count in the order of `kernel.pointers()`, workspaces are added here."""
        given = (Input(rows), *operands, *self._workspaces(kernel))
        if len(given) != len(kernel.pointers()):
            expected = str(len(kernel.pointers()))
            raise CompileError(self.backend, f"kernel {kernel.name}", found=f"{len(given)} arguments", expected=expected)
        self.calls.append(PendingCall(kernel, str(node.name), rows, given, when))

    def _workspaces(self, kernel: Kernel) -> Iterator[Operand]:
        """Zeroed ones are the same memory for all calls, which run one after the other."""
        end = 0
        for workspace in kernel.workspaces():
            if workspace.zeroed:
                yield Scratch(end)
                end += round_up(workspace.bytes, _SCRATCH_ALIGNMENT)
            else:
                yield Place(Buffer("T", 1, workspace.bytes, "uint8"), 0, 0)
        self.scratch_bytes = max(self.scratch_bytes, end)

    def finish(self, node: ir.Node, logits: Place) -> tuple[Place, Place, Place, int] | None:
        """Append what comes after the logits, which `node` gives; returns where counts, places and values of candidates lie,
        and the capacity, where there are any."""
        return None

    def all_reduce(self, node: ir.Node, place: Place) -> None:
        """Append a sum over ranks, in place."""
        assert not place.offset, "rows of a part are not summed"
        self.calls.append(PendingCall(None, str(node.name), place.buffer.rows, (place,)))

    # Weights, by initializer; asking twice gives the same tensor, so tied weights are stored once.

    @abstractmethod
    def float_matrix(self, value: ir.Value | None) -> Weight:
        """float32 [outputs, inputs], of a linear layer or a table."""

    @abstractmethod
    def int8_matrix(self, value: ir.Value | None) -> Weight:
        """int8 [outputs, inputs], likewise."""

    @abstractmethod
    def int8_linear(self, weight: ir.Value | None, scale: ir.Value | None) -> list[Operand]:
        """What the int8 linear kernel takes for a weight and its scales."""

    @abstractmethod
    def int4_linear(self, weight: ir.Value | None, scale: ir.Value | None) -> list[Operand]:
        """What the int4 linear kernel takes for a weight and the scales of its groups."""

    def vector(self, value: ir.Value | None) -> Weight:
        """A float32 vector, padded to whole registers."""
        tensor, name = self.tensor(value)
        size = round_up(tensor.shape.numpy()[0], VECTOR_ALIGNMENT)
        return self.weight(name, "float32", (size,), lambda: pack_vector(tensor.numpy()))

    def number(self, value: ir.Value | None) -> Weight:
        """One int32, padded like a vector."""
        tensor, name = self.tensor(value)
        return self.weight(name, "int32", (VECTOR_ALIGNMENT,), lambda: pack_vector(tensor.numpy()))

    def weight(self, name: str, dtype: str, shape: tuple[int, ...], pack: Callable[[], npt.NDArray[Any]]) -> Weight:
        """A tensor of the engine."""
        known = self.weights.setdefault(name, PackedWeight(name, dtype, shape, pack))
        if (known.dtype, known.shape) != (dtype, shape):
            found = f"two layouts, {known.shape} and {shape}"
            raise CompileError(self.backend, f"weight {name}", found=found, expected="one")
        return Weight(name)

    def tensor(self, value: ir.Value | None) -> tuple[ir.TensorProtocol, str]:
        """An initializer, and its name."""
        if value is None or value.const_value is None:
            what = f"weight {value.name if value else ''}"
            raise CompileError(self.backend, what, found="a computed value", expected="an initializer")
        return value.const_value, str(value.name)

    def matrix(self, value: ir.Value | None) -> tuple[ir.TensorProtocol, str, int, int]:
        """An initializer [outputs, inputs], its name and shape."""
        tensor, name = self.tensor(value)
        outputs, inputs = tensor.shape.numpy()
        return tensor, name, outputs, inputs


def _rows(dimension: ir.SymbolicDim | int) -> Rows | None:
    known: dict[str | int | None, Rows] = {"T": "T", "R": "R"}
    return known.get(dimension.value if isinstance(dimension, ir.SymbolicDim) else dimension)


class LoweredGraph(NamedTuple):
    """The program, the weights in the order of their first use, the kernels (of the backend's own class, without variants) and
    the buffers of a graph."""

    program: Program
    weights: list[PackedWeight]
    kernels: list[Any]
    buffers: list[PlannedBuffer]


def _kv_cache(backend: type[Lowering], asked: str, quantized: bool, head_dim: int) -> str:
    """The type of the KV cache, where "auto" is asked too; bfloat16 lies in pairs."""
    if asked == "bfloat16" and (backend.half != "bfloat16" or head_dim % 2):
        raise CompileError(
            "kv cache", "bfloat16 cannot be had here", found=f"heads of {head_dim} for the backend {backend.backend}",
            expected="heads of an even size on a CPU", remedy="use float16",
        )  # fmt: skip
    half = "float16" if head_dim % 2 else backend.half
    return asked if asked != "auto" else half if quantized else "float32"


def lower(
    backend: type[Lowering], model: ir.Model, calls_before_fusion: int, kv_cache: str = "auto", *, transposed_keys: bool = True
) -> LoweredGraph:
    """Lower a graph with a backend's kernels. `kv_cache` is the type of the KV cache; "auto" is 16 bits with quantized linear
    layers, else float32; `transposed_keys` as in `KVLayout`."""
    from belle_compile.compiler.backends.program.rules import RULES

    metadata = model.metadata_props
    quantized = any(node.op_type in ("QuantizedLinear", "IntegerLinear", "GroupQuantizedLinear") for node in model.graph)
    layers, kv_heads, head_dim = (int(metadata[key]) for key in ("num_layers", "num_kv_heads", "head_dim"))
    kv_dtype = _kv_cache(backend, kv_cache, quantized, head_dim)
    lowering = backend(model, kv_dtype, layers, -(-int(metadata["max_position"]) // 16))
    for node in model.graph:
        rule = RULES.get(node.op_type)
        if rule is None:
            raise CompileError(
                lowering.backend, f"op {node.op_type}", node=str(node.name), found="no kernel",
                expected=", ".join(sorted(RULES)),
                remedy="run the fuse passes or add a rule to compiler/backends/program/rules.py",
            )  # fmt: skip
        rule(lowering, node, attributes_of(node))
    output = model.graph.outputs[0]
    logits, last = lowering.place(output), output.producer()
    assert last is not None, "verified"
    calls_of_graph = len(lowering.calls)
    found = lowering.finish(last, logits)
    calls_behind = len(lowering.calls) - calls_of_graph
    read_after = [logits.buffer, *(place.buffer for place in (found or ())[:3] if isinstance(place, Place))]
    buffers, arena_bytes = _place_buffers(lowering.calls, read_after)
    offsets = {buffer: planned.offset for buffer, planned in buffers.items()}
    candidates = None
    if found is not None:
        *places, capacity = found
        counts, ids, values = (offsets[place.buffer] for place in places if isinstance(place, Place))
        candidates = Candidates(counts, ids, values, capacity)
    calls = tuple(_finish(call, offsets, lowering.weights) for call in lowering.calls)
    facts = {key: int(metadata.get(key, 0)) for key in ("rank", "ranks", "vocab_size", "first_token")}
    ranks = facts["ranks"] or 1
    program = Program(
        max_tokens=backend.sizes.tokens,
        max_rows=backend.sizes.rows,
        max_sequences=backend.sizes.sequences,
        max_blocks=lowering.max_blocks,
        arena_bytes=arena_bytes,
        vocab_size=facts["vocab_size"] if ranks > 1 else logits.width,
        logits=Logits(offsets[logits.buffer], logits.buffer.stride, facts["first_token"], logits.width),
        kv=KVLayout(layers, kv_heads, head_dim, lowering.kv_dtype, transposed_keys),
        calls=calls,
        # Of a step that decodes, where those differ.
        kernel_calls=FusionCalls(calls_before_fusion + calls_behind, sum(call.when != "runs" for call in calls)),
        rank=facts["rank"],
        ranks=ranks,
        scratch_bytes=lowering.scratch_bytes,
        candidates=candidates,
    )
    kernels = list({call.kernel: None for call in lowering.calls if call.kernel})
    read = dict.fromkeys(arg.name for call in calls for arg in call.args if isinstance(arg, Weight))
    return LoweredGraph(program, [lowering.weights[name] for name in read], kernels, list(buffers.values()))


def _buffers(call: PendingCall) -> Iterable[Buffer]:
    return (operand.buffer for operand in call.operands if isinstance(operand, Place))


def _place_buffers(calls: list[PendingCall], read_after: Iterable[Buffer]) -> tuple[dict[Buffer, PlannedBuffer], int]:
    spans: dict[Buffer, tuple[int, int]] = {}
    for index, call in enumerate(calls):
        for buffer in _buffers(call):
            spans[buffer] = (spans.get(buffer, (index, index))[0], index)
    for buffer in read_after:
        spans[buffer] = (spans[buffer][0], len(calls))
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
    made = Call(kind=call.kernel.kind, node=call.node, rows=call.rows, args=args, bytes=read, when=call.when)
    variants = call.kernel.variants()
    if len(variants) == 1:
        return replace(made, kernel=variants[0][1].name)
    return replace(made, variants=tuple((bound, kernel.name) for bound, kernel in variants))


def cache_parts(layer: int) -> tuple[KV, KV]:
    """The key and the value cache of a layer as arguments."""
    return KV(layer, "k"), KV(layer, "v")


def pack_vector(values: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """A vector padded with zeros to 64 bytes."""
    padded = np.zeros(round_up(values.size, VECTOR_ALIGNMENT), values.dtype)
    padded[: values.size] = values.reshape(-1)
    return padded
