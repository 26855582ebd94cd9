"""The content of a report as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from belle_compile.compiler.backends.base import KVCache, MemoryNeed
from belle_compile.compiler.backends.program.memory_plan import PlannedBuffer
from belle_compile.runtime.artifact import FileRecord, Manifest
from belle_compile.runtime.schema import to_plain


@dataclass(frozen=True)
class Drift:
    """Distance of the logits from those of the unmodified graph: KL divergence of the predictions in nats per token, the share
    of tokens after which both predict the same token, and the greatest difference relative to the largest logit."""

    kl: float
    top1: float
    max_difference: float


@dataclass(frozen=True)
class Stage:
    """The graph after a pass, or before the first pass, where `changes` is None.

    `weight_bytes` is the size of the weights that the graph reads. `kernel_calls` counts the kernel calls of a step; if
    `lowers` is False, some ops have no kernel and are counted as if they had. If `whole` is False, the graph is that of rank 0
    of several, which computes no logits without the others."""

    name: str
    changes: int | None
    weight_bytes: int
    kernel_calls: int
    lowers: bool
    drift: Drift | None = None
    whole: bool = True


@dataclass(frozen=True)
class Effects:
    """The stages of a pipeline, and the number of tokens that drift was measured on; if 0, `unmeasured` gives the reason."""

    stages: tuple[Stage, ...] = ()
    tokens: int = 0
    unmeasured: str = "not measured"


class Damage(Protocol):
    """Damage that INT8 does to a linear layer: the relative squared error of its outputs, and, where it was measured, the KL
    divergence (nats per token) of the predictions when no other layer is INT8."""

    @property
    def name(self) -> str: ...
    @property
    def weights(self) -> int: ...
    @property
    def output_error(self) -> float: ...
    @property
    def kl(self) -> float | None: ...


@dataclass(frozen=True)
class Arena:
    """The memory of a step's activations: its size in bytes, and the lifetimes of its buffers over `calls` kernel calls."""

    bytes: int
    buffers: tuple[PlannedBuffer, ...]
    calls: int


@dataclass(frozen=True)
class Memory:
    """The memory that a rank needs with `kv_tokens` tokens of one sequence in its KV cache.

    `weights` are the bytes of `need.weights` by purpose. For a backend that makes no program, the purposes are unknown:
    `weights` has one entry, and `arena` is None."""

    need: MemoryNeed
    kv: KVCache
    kv_tokens: int
    weights: Mapping[str, int]
    arena: Arena | None = None

    @property
    def kv_token(self) -> float:
        """Bytes of the KV cache per token."""
        return self.kv.block_bytes / self.kv.block_tokens


@dataclass(frozen=True)
class Report:
    """Everything that the page shows.

    `files` are the files of the engine other than manifest and report. `memory` is that of the rank that needs most; `ranks`
    has one entry per rank if there are several, else none. `coverage` describes the calibration requests as a mapping of
    numbers, texts, and mappings or lists of these. Without requests it is None and `layers` is empty; `uncalibrated` may give
    the reason."""

    manifest: Manifest
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    effects: Effects = Effects()
    memory: Memory | None = None
    layers: Sequence[Damage] = ()
    coverage: Mapping[str, Any] | None = None
    ranks: Sequence[Memory] = ()
    uncalibrated: str = ""

    def to_plain(self) -> dict[str, Any]:
        """The fields as JSON values."""
        plain: dict[str, Any] = to_plain(self)
        return plain
