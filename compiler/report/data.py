"""What a report shows, as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from belle_compile.compiler.backends.program.memory_plan import PlannedBuffer
from belle_compile.runtime.artifact import FileRecord, Manifest
from belle_compile.runtime.schema import to_plain


@dataclass(frozen=True)
class Drift:
    """How far logits are from those of the frontend's graph: KL divergence of the predictions (nats a token), the share of
    tokens after which both predict the same, and the greatest difference as a part of the largest logit."""

    kl: float
    top1: float
    max_difference: float


@dataclass(frozen=True)
class Stage:
    """The graph after a pass, or as the frontend made it: `changes` is None then. `weight_bytes` are those of the weights it
    reads; `kernel_calls` of a step count one for each op, also where the graph has ops without a kernel (`lowers` is False). A
    graph that is not `whole` is that of rank 0 of several, which has no logits without the others."""

    name: str
    changes: int | None
    weight_bytes: int
    kernel_calls: int
    lowers: bool
    drift: Drift | None = None
    whole: bool = True


@dataclass(frozen=True)
class Effects:
    """The stages of a pipeline, and over how many tokens drift was measured; with none, `unmeasured` says why in words."""

    stages: tuple[Stage, ...] = ()
    tokens: int = 0
    unmeasured: str = "not measured"


class Damage(Protocol):
    """What INT8 does to a linear layer: the relative squared error of its outputs, and, where that was measured, the KL
    divergence (nats a token) of the predictions when nothing else is INT8."""

    @property
    def name(self) -> str: ...
    @property
    def weights(self) -> int: ...
    @property
    def output_error(self) -> float: ...
    @property
    def kl(self) -> float | None: ...


@dataclass(frozen=True)
class Memory:
    """Bytes that an engine needs: weights by what they are for, the arena with its buffers over `calls` calls, the KV cache for
    `kv_tokens` tokens of one sequence (`max_context` at most), and `required`, with everything else."""

    weights: Mapping[str, int]
    arena: int
    buffers: tuple[PlannedBuffer, ...]
    calls: int
    kv_block: int
    kv_block_tokens: int
    kv_tokens: int
    max_context: int
    required: int

    @property
    def kv_token(self) -> float:
        """Bytes of the KV cache for each token."""
        return self.kv_block / self.kv_block_tokens

    @property
    def kv_served(self) -> int:
        """Bytes of the KV cache that `required` has room for."""
        return -(-self.kv_tokens // self.kv_block_tokens) * self.kv_block

    @property
    def rest(self) -> int:
        """What is required beside weights, arena and KV cache: kernels, program, tokenizer, the process."""
        return self.required - sum(self.weights.values()) - self.arena - self.kv_served


@dataclass(frozen=True)
class Report:
    """Everything on the page. `files` are the engine's others; `memory` is that of the rank that needs most, `ranks` that of
    each where there are several; `coverage` says what calibration requests covered, as a mapping of numbers, texts, and
    mappings or lists of these; None and no `layers` where a build had no requests, or for the reason `uncalibrated`."""

    manifest: Manifest
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    effects: Effects = Effects()
    memory: Memory | None = None
    layers: Sequence[Damage] = ()
    coverage: Mapping[str, Any] | None = None
    ranks: Sequence[Memory] = ()
    uncalibrated: str = ""

    def to_plain(self) -> dict[str, Any]:
        """As JSON has it."""
        plain: dict[str, Any] = to_plain(self)
        return plain
