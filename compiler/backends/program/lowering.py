"""The data of lowering: places of values, packed weights, pending calls, and the class that collects them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from belle_compile.compiler.backends.program.kernel import ROW_ALIGNMENT, Kernel, View, round_up
from belle_compile.compiler.backends.program.memory_plan import PlannedBuffer
from belle_compile.compiler.errors import CompileError
from belle_compile.runtime.program import KV, AdapterLayout, Arg, Input, Program, Scratch, Weight, When

Rows = Literal["T", "R"]
VECTOR_ALIGNMENT = 16  # 64 bytes of float32 or int32
_PLANES = {ir.DataType.INT8: 1, ir.DataType.INT16: 2}  # number of byte planes of a quantized activation
_SCRATCH_ALIGNMENT = 256


@dataclass(frozen=True)
class PackedWeight:
    """A tensor of the engine in the backend's layout; each call of `pack` reads its source and packs it again."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pack: Callable[[], npt.NDArray[Any]]

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class StepSizes:
    """The most tokens, rows of logits and sequences of one step; longer prompts take several steps."""

    tokens: int
    rows: int
    sequences: int

    def most(self, rows: Rows) -> int:
        """The largest number of rows of activations: one for each token ("T") or for each row of logits ("R")."""
        return self.tokens if rows == "T" else self.rows


@dataclass(eq=False)
class Buffer:
    """Memory for up to `most` rows of activations, or for the `workspace` of one call, which is one row; the memory plan places
    it in the arena."""

    rows: Rows
    most: int
    stride: int  # elements from row to row
    dtype: str
    workspace: bool = False

    @property
    def row_bytes(self) -> int:
        return self.stride * np.dtype(self.dtype).itemsize

    @property
    def bytes(self) -> int:
        return self.most * self.row_bytes


@dataclass(frozen=True)
class Place:
    """The place of a value in a buffer: `width` elements of each row from element `offset` on.

    16-bit activations are stored as two `planes` of bytes, one after the other in each row.
    """

    buffer: Buffer
    offset: int
    width: int
    planes: int = 1

    @property
    def view(self) -> View:
        return View(self.buffer.stride, self.offset)


Operand = Place | Arg


@dataclass(frozen=True)
class PendingCall:
    """A call whose buffers have no addresses yet. Without a kernel, it sums its one operand over all ranks in place."""

    kernel: Kernel | None
    node: str
    rows: Rows
    operands: tuple[Operand, ...]
    when: When = "always"


@dataclass(frozen=True)
class Kernels:
    """The kernel classes of a backend, which rules.py instantiates. A kernel has the same fields in every backend."""

    FloatLinear: Callable[..., Kernel]
    QuantizedLinear: Callable[..., Kernel]
    FloatEmbedding: Callable[..., Kernel]
    QuantizedEmbedding: Callable[..., Kernel]
    Norm: Callable[..., Kernel]
    HeadNorm: Callable[..., Kernel]
    Activation: Callable[..., Kernel]
    BlockHadamard: Callable[..., Kernel]
    QuantizeTokens: Callable[..., Kernel]
    RotaryTable: Callable[..., Kernel]
    Add: Callable[..., Kernel]
    GatherRows: Callable[..., Kernel]
    AppendKV: Callable[..., Kernel]
    # Attention kernels, each with the steps or tokens that it is called for
    Attention: Sequence[tuple[When, Callable[..., Kernel]]]
    GroupLinear: Callable[..., Kernel] | None = None
    LowRank: Callable[..., Kernel] | None = None


@dataclass(frozen=True)
class CandidatePlaces:
    """The places of a program's candidates for the next token: for each row their count, tokens and logits, at most `capacity`
    of them."""

    counts: Place
    tokens: Place
    values: Place
    capacity: int


@dataclass
class Lowering(ABC):
    """The calls, places and weights of one graph, to which the rules in `rules.py` add; a backend derives its own class."""

    backend: ClassVar[str]
    kernels: ClassVar[Kernels]
    byte: ClassVar[str]  # dtype of the bytes of quantized activations
    sizes: ClassVar[StepSizes]
    half: ClassVar[str]  # dtype of a KV cache of 16 bits

    model: ir.Model
    kv_dtype: str
    num_layers: int
    max_blocks: int
    places: dict[ir.Value, Place] = field(default_factory=dict)
    weights: dict[str, PackedWeight] = field(default_factory=dict)
    calls: list[PendingCall] = field(default_factory=list)
    scratch_bytes: int = 0
    adapters: AdapterLayout | None = None

    def place(self, value: ir.Value | None) -> Place:
        """The place of an activation; raises CompileError if no earlier node computes it."""
        assert value is not None
        if value not in self.places:
            what = f"value {value.name}"
            raise CompileError(self.backend, what, found="used before it is computed", expected="a node's output")
        return self.places[value]

    def allocate(self, value: ir.Value) -> Place:
        """Place a node's output in a new buffer. Per-token scales have stride 1.

        Quantized activations are bytes; those of 16 bits are two planes of bytes, each padded like a row.
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
        """The distance in elements from the start of a row, or of a plane of a row, to that of the next."""
        return round_up(width, ROW_ALIGNMENT)

    def buffer(self, rows: Rows, stride: int, dtype: str) -> Buffer:
        """A new buffer for the rows of a step."""
        return Buffer(rows, self.sizes.most(rows), stride, dtype)

    def call(self, kernel: Kernel, node: ir.Node, rows: Rows, *operands: Operand, when: When = "always") -> None:
        """Append a call of a kernel.

        `operands` are its arguments in the order of `kernel.pointers()`, without the row count before them and the workspaces
        after them.
        """
        given = (Input(rows), *operands, *self._workspaces(kernel))
        if len(given) != len(kernel.pointers()):
            expected = str(len(kernel.pointers()))
            raise CompileError(self.backend, f"kernel {kernel.name}", found=f"{len(given)} arguments", expected=expected)
        self.calls.append(PendingCall(kernel, str(node.name), rows, given, when))

    def _workspaces(self, kernel: Kernel) -> Iterator[Operand]:
        """The workspaces of a call. Zeroed ones share the same scratch memory in all calls, which run one after the other."""
        end = 0
        for workspace in kernel.workspaces():
            if workspace.zeroed:
                yield Scratch(end, workspace.bytes)
                end += round_up(workspace.bytes, _SCRATCH_ALIGNMENT)
            else:
                yield Place(Buffer("T", 1, workspace.bytes, "uint8", workspace=True), 0, 0)
        self.scratch_bytes = max(self.scratch_bytes, end)

    def finish(self, node: ir.Node, logits: Place) -> CandidatePlaces | None:
        """Append the calls that select candidates for the next token from the logits of `node`; None for a backend without
        them."""
        return None

    def all_reduce(self, node: ir.Node, place: Place) -> None:
        """Append a sum over ranks, in place."""
        assert not place.offset, "rows of a part are not summed"
        self.calls.append(PendingCall(None, str(node.name), place.buffer.rows, (place,)))

    # The methods below return the weight of an initializer. A second call for the same initializer returns the same weight, so
    # that tied weights are stored once.

    @abstractmethod
    def float_matrix(self, value: ir.Value | None) -> Weight:
        """A float32 matrix [outputs, inputs] of a linear layer, or a table."""

    @abstractmethod
    def int8_matrix(self, value: ir.Value | None) -> Weight:
        """An int8 matrix [outputs, inputs] of a linear layer, or a table."""

    @abstractmethod
    def int8_linear(self, weight: ir.Value | None, scale: ir.Value | None) -> list[Operand]:
        """The operands of the int8 linear kernel for a weight and its scales."""

    @abstractmethod
    def group_linear(self, weight: ir.Value | None, scale: ir.Value | None, bits: int) -> list[Operand]:
        """The operands of the linear kernel for a weight of 4 or 6 `bits` and the scales of its groups."""

    def vector(self, value: ir.Value | None) -> Weight:
        """A float32 vector, padded with zeros to 64 bytes."""
        tensor, name = self.tensor(value)
        size = round_up(tensor.shape.numpy()[0], VECTOR_ALIGNMENT)
        return self.weight(name, "float32", (size,), lambda: pack_vector(tensor.numpy()))

    def number(self, value: ir.Value | None) -> Weight:
        """One int32, padded like a vector."""
        tensor, name = self.tensor(value)
        return self.weight(name, "int32", (VECTOR_ALIGNMENT,), lambda: pack_vector(tensor.numpy()))

    def weight(self, name: str, dtype: str, shape: tuple[int, ...], pack: Callable[[], npt.NDArray[Any]]) -> Weight:
        """Register a tensor of the engine; raises CompileError if it was registered with another dtype or shape."""
        known = self.weights.setdefault(name, PackedWeight(name, dtype, shape, pack))
        if (known.dtype, known.shape) != (dtype, shape):
            found = f"two layouts, {known.shape} and {shape}"
            raise CompileError(self.backend, f"weight {name}", found=found, expected="one")
        return Weight(name)

    def tensor(self, value: ir.Value | None) -> tuple[ir.TensorProtocol, str]:
        """The tensor and the name of an initializer; raises CompileError for any other value."""
        if value is None or value.const_value is None:
            what = f"weight {value.name if value else ''}"
            raise CompileError(self.backend, what, found="a computed value", expected="an initializer")
        return value.const_value, str(value.name)

    def matrix(self, value: ir.Value | None) -> tuple[ir.TensorProtocol, str, int, int]:
        """The tensor, name, outputs and inputs of an initializer [outputs, inputs]."""
        tensor, name = self.tensor(value)
        outputs, inputs = tensor.shape.numpy()
        return tensor, name, outputs, inputs


def _rows(dimension: ir.SymbolicDim | int) -> Rows | None:
    """The kind of rows that a dimension counts; None for any other dimension."""
    known: dict[str | int | None, Rows] = {"T": "T", "R": "R"}
    return known.get(dimension.value if isinstance(dimension, ir.SymbolicDim) else dimension)


class LoweredGraph(NamedTuple):
    """A lowered graph: the program, its weights in the order of their first use, its kernels (of the backend's class `Kernel`,
    their variants not listed), and its activation buffers."""

    program: Program
    weights: list[PackedWeight]
    kernels: list[Any]
    buffers: list[PlannedBuffer]


def cache_parts(layer: int) -> tuple[KV, KV]:
    """The key and the value cache of a layer as arguments."""
    return KV(layer, "k"), KV(layer, "v")


def pack_vector(values: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """A vector padded with zeros to 64 bytes."""
    padded = np.zeros(round_up(values.size, VECTOR_ALIGNMENT), values.dtype)
    padded[: values.size] = values.reshape(-1)
    return padded
