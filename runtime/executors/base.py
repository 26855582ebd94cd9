"""The protocol of an executor, which runs the steps of an engine, and two further ones: for profiles and for several ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from belle_compile.runtime.adapters.factors import AdapterSlots
from belle_compile.runtime.executors.batch import StepBatch
from belle_compile.runtime.program import Program
from belle_compile.runtime.serving.candidates import Rows

if TYPE_CHECKING:
    from belle_compile.runtime.distributed.collectives import Collectives
    from belle_compile.runtime.profiling import Recorder


class Executor(Protocol):
    """Runs steps over a paged KV cache that it owns; used by one thread at a time.

    The shapes of `batch` are its limits (`StepBatch.max_tokens` and so on); the cache has `num_blocks` blocks of
    `kv_block_bytes` bytes, keys and values of all layers.

    `kernels` names everything that the bits of logits depend on beside the engine's files: the instruction set, and what was
    chosen among kernels that the engine carries. Executors of one engine with the same `kernels` compute the same bits, so
    that answers of one may be given in place of the other's.
    """

    batch: StepBatch
    vocab_size: int
    num_blocks: int
    kv_block_bytes: int
    kernels: str

    def step(self, batch: StepBatch) -> Rows:
        """Copy the blocks of `batch.copies`, then compute the logits of `batch.rows` rows, valid until the next step.

        `batch` is the executor's `batch`, or another one over the same buffers with other counts.
        """
        ...

    def close(self) -> None:
        """Free the memory. The executor is not used afterwards."""
        ...


@runtime_checkable
class ProfilableExecutor(Executor, Protocol):
    """An executor that runs a program and can time its kernel calls."""

    program: Program
    isa: str
    threads: int

    def record(self, recorder: Recorder | None) -> None:
        """Report every kernel call to `recorder` from the next step on; with None, stop."""
        ...

    def read_bandwidth(self) -> float:
        """Bytes a second that memory delivers: the limit of steps that read much and compute little."""
        ...


@runtime_checkable
class AdaptableExecutor(Executor, Protocol):
    """An executor that can add the changes of adapters to the results of linears. `adapters` are its slots; None for none."""

    adapters: AdapterSlots | None


@runtime_checkable
class RankExecutor(Executor, Protocol):
    """An executor that can be one of several ranks. It computes the logits of a part of the vocabulary.

    `sums` are the sums over ranks in the order of a step, the same on all ranks: their rows ("T" or "R") and width.
    """

    span: tuple[int, int]  # the part of the vocabulary: its first token, and the number of its tokens
    sums: Sequence[tuple[str, int]]

    def join(self, collectives: Collectives) -> None:
        """Connect to the other ranks. All ranks call it before the first step, once all are ready."""
        ...
