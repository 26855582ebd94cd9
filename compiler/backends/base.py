"""The interface of backends, the payload that they compile a rank's graph to, and their registry.

A new backend is a subclass of `Backend` and a call of `register`. Code outside of a backend never branches on the kind of
device or backend: it calls a method of the backend, or reads a field of the payload.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy.typing as npt

from belle_compile.compiler.backends.program.memory_plan import PlannedBuffer
from belle_compile.compiler.devices import Device, Target
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.kv_types import AUTO
from belle_compile.runtime.artifact import KernelCalls, PassRecord
from belle_compile.runtime.program import KV_DTYPES, SERVED_TOKENS, Program

if TYPE_CHECKING:
    import onnx_ir as ir

    from belle_compile.passes.presets import Recipe

Array = npt.NDArray[Any]

SCALED_PRODUCTS = frozenset({"fuse-dequantize"})  # needed where kernels of integer products scale their sums themselves
TUNING = "tune-kernels"  # name of the manifest's record of the kernels measured for an engine
ITEM_BYTES = {"int8": 1, "uint8": 1, "float16": 2, "bfloat16": 2, "int32": 4, "float32": 4, "int64": 8}
FIXED_BYTES = 32 << 20  # kernels, runtime library, tokenizer, program
PROCESS_BYTES = 256 << 20  # the host memory of Python and the tokenizer
_REMEDY = "see `belle-compile targets`"


@dataclass(frozen=True)
class Passes:
    """The names of the methods and of the fusing passes whose results a backend can compile; None stands for all of them.

    `needed` are the fusing passes without which ops are left that it has no kernels for: they run in builds without fusion too.
    """

    methods: frozenset[str] | None = None
    fusions: frozenset[str] | None = None
    needed: frozenset[str] = frozenset()

    def carries_method(self, name: str) -> bool:
        return self.methods is None or name in self.methods

    def carries_fusion(self, name: str) -> bool:
        return self.fusions is None or name in self.fusions


@dataclass(frozen=True)
class KVCache:
    """The KV cache of one rank: the type of its numbers, the bytes of a block of `block_tokens` tokens over all layers, and the
    tokens of the longest sequence."""

    dtype: str
    block_bytes: int
    block_tokens: int
    max_context: int

    def bytes(self, tokens: int) -> int:
        """Bytes of the blocks that `tokens` tokens of one sequence occupy."""
        return -(-tokens // self.block_tokens) * self.block_bytes


@dataclass(frozen=True)
class StepPlan:
    """A step as kernel calls, and its activation buffers in the arena, in the order of the calls that write them first."""

    program: Program
    buffers: tuple[PlannedBuffer, ...]


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes of memory that one rank needs, by purpose. `reserve` is the memory beside the model: that of kernels, tokenizer,
    and the process or the driver. `mapped` of the `weights` are mapped from the engine's files."""

    weights: int
    kv_cache: int
    activations: int
    reserve: int
    mapped: int = 0

    @property
    def total(self) -> int:
        """What the rank needs to read no weight from a file twice."""
        return self.weights + self.kv_cache + self.activations + self.reserve

    @property
    def resident(self) -> int:
        """What the rank needs to run at all: all but the mapped weights, which the kernel can take back and read again."""
        return self.total - self.mapped


@dataclass(frozen=True)
class Footprint:
    """The memory of one rank on its host or device, in bytes. It depends on the graph alone, not on results of compilation, so
    that it is the same before and after a build. `step` is None for a backend that makes no program. `maps_weights` says
    whether the executor uses the weights where they are mapped, and keeps no copy of them."""

    weights: int
    activations: int
    reserve: int
    kv: KVCache
    step: StepPlan | None = None
    maps_weights: bool = False

    def memory(self, sequences: int = 1, tokens: int | None = None) -> MemoryNeed:
        """The memory needed to serve `sequences` sequences of `tokens` tokens each (None: `SERVED_TOKENS`, or the longest
        context where that is shorter)."""
        tokens = min(SERVED_TOKENS, self.kv.max_context) if tokens is None else tokens
        mapped = self.weights if self.maps_weights else 0
        return MemoryNeed(self.weights, sequences * self.kv.bytes(tokens), self.activations, self.reserve, mapped)


class PackedTensor(Protocol):
    """A tensor in the layout that the engine stores. `pack` computes its values when it is written; they are not kept."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def pack(self) -> Callable[[], Array]: ...


def tensor_bytes(tensor: PackedTensor) -> int:
    """The size of a tensor's data in bytes."""
    return prod(tensor.shape) * ITEM_BYTES[tensor.dtype]


@dataclass(frozen=True)
class Payload:
    """The compiled form of the graph of one rank.

    `files` are written to the rank's directory by name. `weights` become its weights.safetensors, which is left out if there
    are none. They come in groups, the same number for every rank: groups with the same index are packed together, so that a
    tensor of which several ranks have a part is computed once. `kernel_calls` are those of one decoding step, before and after
    fusion, `toolchain` maps the tools that made the files to their versions, and `tuning` is the manifest's record of the
    kernels measured for this build. `quantization` are the entries of the manifest's words on quantization in which the engine
    differs from its recipe.
    """

    files: Mapping[str, bytes | memoryview]
    weights: Sequence[Sequence[PackedTensor]]
    footprint: Footprint
    kernel_calls: KernelCalls
    toolchain: Mapping[str, str] = field(default_factory=dict)
    tuning: PassRecord | None = None
    quantization: Mapping[str, str] = field(default_factory=dict)

    @property
    def tensors(self) -> list[PackedTensor]:
        """All weights in the order in which the engine holds them."""
        return [tensor for group in self.weights for tensor in group]

    @property
    def file_bytes(self) -> int:
        """Bytes of the rank's directory on disk."""
        return sum(map(tensor_bytes, self.tensors)) + sum(memoryview(content).nbytes for content in self.files.values())


@dataclass(frozen=True)
class LibraryChoice:
    """Which library builds an engine, of a backend that has several, and how.

    `name` is one of `Backend.libraries` (None: the one that is installed). With `version_compatible`, the engine is to run with
    later versions of the library too. `timing_cache` is a file with the times of kernels that the library measures: where it is
    there, they are not measured again, and the file is written.
    """

    name: str | None = None
    version_compatible: bool = False
    timing_cache: Path | None = None


ANY_LIBRARY = LibraryChoice()


@dataclass(frozen=True)
class CompileOptions:
    """How graphs are compiled: the type of the KV cache, the library, and the kernel calls of a step before fusion, which the
    payload records. `tune` is None, or the progress callback (done, total) of measuring kernels on this host, which it turns
    on. `on_kernels` is called with the numbers of kernels compiled so far and of all that this engine needs."""

    kv_cache: str = AUTO
    unfused_calls: int = 0
    tune: Callable[[int, int], None] | None = None
    on_kernels: Callable[[int, int], None] = lambda done, total: None
    library: LibraryChoice = ANY_LIBRARY


@dataclass(frozen=True)
class Reached:
    """The shares of a device's rates that a backend's kernels reach in whole steps, as measured.

    `read` is the share of the read bandwidth, `several` the further share of it in products of several rows, `integer` and
    `floating` are those of the operations a second; `call_s` is the fixed cost of a kernel call in seconds. `source` names the
    measurement.
    """

    read: float
    several: float
    integer: float
    floating: float
    call_s: float
    source: str


class Backend(ABC):
    """Compiles the graphs of all ranks for the devices that it serves.

    `name` is recorded in the manifest, and the runtime chooses the executor by it. `kv_types` are the types that a KV cache can
    have, the widest first. `libraries` are the names of those that can build engines, where there are several to choose from.
    With `reached`, `plan` predicts the time of a step; without, it predicts memory only.
    """

    name: str
    kv_types: tuple[str, ...]
    reached: Reached | None = None
    libraries: tuple[str, ...] = ()

    @abstractmethod
    def isas(self, device: Device) -> tuple[str, ...]:
        """The instruction sets of a device that the backend compiles for, best first; empty for a device that it does not
        serve."""

    @abstractmethod
    def passes(self, recipe: Recipe) -> Passes:
        """The methods and fusing passes whose results the backend can compile."""

    @abstractmethod
    def footprint(self, graphs: Sequence[ir.Model], target: Target, kv_cache: str = AUTO) -> list[Footprint]:
        """The footprint of each rank's fused graph; reads no weights and takes no longer than lowering. Raises CompileError for
        an op that cannot be compiled."""

    @abstractmethod
    def compile(self, graphs: Sequence[ir.Model], target: Target, options: CompileOptions) -> list[Payload]:
        """The payload of each rank's fused and verified graph. The same graphs and toolchain give the same bytes."""

    def refusal(self, target: Target, recipe: Recipe) -> str:
        """The reason, as a phrase, why the backend cannot build a recipe for a target whose device it serves; empty if it
        can."""
        passes = self.passes(recipe)
        missing = [method for method in recipe.methods if not passes.carries_method(method)]
        if not missing:
            return ""
        return (
            f"no support for the method {' or '.join(missing)} (supported: {', '.join(sorted(passes.methods or ())) or 'none'})"
        )

    def check_library(self, target: Target, choice: LibraryChoice) -> None:
        """Raise CompileError where this host cannot build for the target with the chosen library: by default, where something
        is chosen."""
        if choice != ANY_LIBRARY:
            others = ", ".join(backend.name for backend in registered() if backend.libraries)
            remedy = "leave out --library, --version-compatible and --timing-cache"
            what = f"options of libraries for the backend {self.name}"
            raise CompileError("backend", what, found="a choice", expected=f"one for {others}", remedy=remedy)

    def tuning_refusal(self, target: Target) -> str:
        """The reason, as a phrase, why kernels cannot be measured during a build for the target; empty if they can."""
        return "no kernels to measure"

    def adapter_refusal(self, target: Target) -> str:
        """The reason, as a phrase, why an engine for the target cannot take adapters at run time; empty if it can."""
        return "no kernel that adds the changes of adapters"

    def estimates(self, device: Device) -> bool:
        """Whether `footprint` is valid for a device, including devices that no engine can be made for yet."""
        return bool(self.isas(device))

    def kernel_calls(self, graph: ir.Model) -> int:
        """The number of kernel calls in one step of a graph, assuming that each of its ops can be run unfused."""
        return sum(1 for _ in graph.graph)

    def has_kernels(self, graph: ir.Model) -> bool:
        """Whether every op of a graph can be run unfused."""
        return True

    def nearest_kv_type(self, dtype: str) -> str:
        """The backend's type for a KV cache that had the type `dtype` in another backend: the same, else one of equal bits,
        else AUTO."""
        if dtype in self.kv_types:
            return dtype
        return next((kv_type for kv_type in self.kv_types if KV_DTYPES[kv_type] == KV_DTYPES.get(dtype)), AUTO)


class Repartitionable(ABC):
    """A backend whose engines can be repartitioned: their packed weights can be read back."""

    @abstractmethod
    def kv_type(self, rank: Path) -> str:
        """The type of the KV cache of an engine; `rank` is the directory of one of its ranks."""

    @abstractmethod
    def unpack(self, packed: Array, shape: tuple[int, ...], dtype: str) -> Array:
        """The values, in the unpacked `shape` and `dtype` (int4 as int8), of a tensor that the engine holds packed."""


_BACKENDS: dict[str, Backend] = {}


def register(backend: Backend) -> None:
    """Add a backend under its name. The first one registered of those that serve a device is its default."""
    known = _BACKENDS.setdefault(backend.name, backend)
    assert type(known) is type(backend), f"there is another backend of the name {backend.name}"


def registered() -> tuple[Backend, ...]:
    """All backends in the order in which they were registered."""
    return tuple(_BACKENDS.values())


def get(name: str) -> Backend:
    """The backend called `name`; raises CompileError if there is none."""
    backend = _BACKENDS.get(name)
    if backend is None:
        raise CompileError("backend", "unknown backend", found=repr(name), expected=_names(_BACKENDS.values()))
    return backend


def serving(device: Device) -> tuple[Backend, ...]:
    """The backends that make engines for a device, the default first."""
    return tuple(backend for backend in registered() if backend.isas(device))


def choose(device: Device, name: str | None = None) -> Backend:
    """The backend called `name`, or the device's default for None; raises CompileError if it does not serve the device."""
    return _among(serving(device), device, name)


def estimator(device: Device, name: str | None = None) -> Backend:
    """The backend that estimates a model's memory on a device: one that makes engines for it if there is any. Arguments and
    errors are those of `choose`."""
    estimating = (backend for backend in registered() if backend.estimates(device))
    return _among(tuple(dict.fromkeys((*serving(device), *estimating))), device, name)


def _among(candidates: Sequence[Backend], device: Device, name: str | None) -> Backend:
    backend = next(iter(candidates), None) if name is None else get(name)
    if backend is None or backend not in candidates:
        expected = _names(candidates) or "another device"
        raise CompileError("backend", f"backend for {device.name}", found=name or "none", expected=expected, remedy=_REMEDY)
    return backend


def check(backend: Backend, target: Target, recipe: Recipe) -> None:
    """Raise CompileError if a backend cannot build a recipe for a target; the error names backends that can."""
    reason = backend.refusal(target, recipe)
    if not reason:
        return
    others = [other for other in serving(target.device) if not other.refusal(target, recipe)]
    remedy = f"use --backend {_names(others)}" if others else "choose another --quant, --methods or --target"
    raise CompileError("backend", f"{backend.name} cannot build this for {target.name}", found=reason, remedy=remedy)


def check_kv_cache(backend: Backend, dtype: str) -> None:
    """Raise CompileError for a type of the KV cache that a backend does not have."""
    if dtype not in (known := (AUTO, *backend.kv_types)):
        what = f"unknown type for the backend {backend.name}"
        raise CompileError("kv cache", what, found=repr(dtype), expected=" or ".join(known))


def _names(backends: Iterable[Backend]) -> str:
    return " or ".join(backend.name for backend in backends)
