"""The base class of executors that run whole models on one GPU: answers in a run for all slots, prompts in runs of a chunk."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from belle_compile.runtime.executors.batch import StepBatch
from belle_compile.runtime.executors.device import Device
from belle_compile.runtime.executors.device_blocks import DeviceBlocks, pool_blocks
from belle_compile.runtime.executors.kv_memory import KvMemory
from belle_compile.runtime.executors.kv_slots import Geometry, SlottedCache
from belle_compile.runtime.executors.segments import Segment, divided
from belle_compile.runtime.program import BLOCK_SIZE

Integers = NDArray[np.int32]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Runs:
    """The fixed shapes of runs: `sequences` slots with a token each, or `chunk` tokens of a prompt, of which `rows` can have
    logits. A slot without a token computes one at `idle_position`, whose block it gives up."""

    sequences: int
    chunk: int
    rows: int
    idle_position: int


class DeviceExecutor(ABC):
    """A model with its KV cache on one GPU.

    Both kinds of runs have one shape. A run of answers computes a token in every slot of the cache. A chunk of a prompt is
    filled up with tokens that are written behind it. Tokens of answers and of prompts are computed by different kernels: see
    `StepBatch.answers_apart`. A subclass loads its model, calls `_prepare`, and runs what `_prompt` and `_answers` get.
    """

    kernels: str

    def __init__(self, device: Device) -> None:
        self._device = device

    @abstractmethod
    def _prompt(self, ids: Integers, segment: Segment, slot: int, rows: Integers) -> Floats:
        """Run a chunk of a prompt in a slot. `ids` is [chunk], zeros behind the segment's tokens; returns the logits of the
        tokens `rows` of the chunk, valid until the next run."""

    @abstractmethod
    def _answers(self, ids: Integers, positions: Integers, lengths: Integers, rows: Integers) -> Floats:
        """Run one token in each slot. `lengths` are those of the sequences with it; returns the logits of the slots `rows`,
        valid until the next run."""

    @abstractmethod
    def _unload(self) -> None:
        """Let go of the model, and of arrays over the GPU's memory, which is freed next."""

    def _prepare(
        self, geometry: Geometry, runs: Runs, vocab_size: int, kv_memory: KvMemory, model: tuple[str, int], stage: str
    ) -> None:
        """Allocate the cache; `model` is what lies beside it, and its bytes, for errors of `stage` (`pool_blocks`)."""
        device, self._run_shapes, self.vocab_size = self._device, runs, vocab_size
        table_blocks = (geometry.capacity - runs.chunk) // BLOCK_SIZE
        self.kv_block_bytes = geometry.token_bytes * BLOCK_SIZE
        most = runs.sequences * table_blocks
        self.num_blocks = pool_blocks(geometry, runs.sequences, most, kv_memory, device, model, stage)
        self._memory = DeviceBlocks(geometry, runs.sequences, self.num_blocks, device)
        self._cache = SlottedCache(self._memory, runs.sequences, self.num_blocks, geometry.capacity // BLOCK_SIZE)
        self._logits = np.zeros((runs.rows, vocab_size), np.float32)
        tokens, positions, sequences = (np.zeros(runs.chunk + runs.sequences, np.int32) for _ in range(3))
        table = np.zeros((runs.sequences, table_blocks), np.int32)
        self.batch = StepBatch(tokens, positions, sequences, table, np.zeros(runs.rows, np.int32), answers_apart=True)

    def step(self, batch: StepBatch) -> Floats:
        """Run `batch`; return float32 logits [rows, vocabulary], valid until the next step."""
        self._device.enter()  # engines run steps on a thread that did not load them
        for source, destination in batch.copies:
            self._cache.copy_block(source, destination)
        prompts, answers = divided(batch, self._run_shapes.chunk)
        for segment in prompts:
            self._run_prompt(batch, segment)
        for tokens in answers:
            self._run_answers(batch, tokens)
        return self._logits[: batch.rows]

    def close(self) -> None:
        """Free the GPU's memory."""
        self._device.enter()
        self._unload()
        for name in ("batch", "_cache", "_memory"):
            self.__dict__.pop(name, None)
        self._device.close()

    def _run_prompt(self, batch: StepBatch, segment: Segment) -> None:
        start, count = segment.start, segment.count
        slot = self._cache.prepare(segment.row, batch.block_table[segment.row], start, count)
        self._cache.clear(slot, start + count, start + self._run_shapes.chunk)
        ids = np.zeros(self._run_shapes.chunk, np.int32)
        ids[:count] = batch.token_ids[segment.at : segment.at + count]
        requested = batch.logit_rows[: batch.rows]
        wanted = np.flatnonzero((requested >= segment.at) & (requested < segment.at + count))
        self._logits[wanted] = self._prompt(ids, segment, slot, requested[wanted] - segment.at)

    def _run_answers(self, batch: StepBatch, segments: Sequence[Segment]) -> None:
        sequences, idle = self._run_shapes.sequences, self._run_shapes.idle_position
        ids, positions, lengths = (np.full(sequences, value, np.int32) for value in (0, idle, 1))
        slots = {segment.at: self._cache.slot(segment.row) for segment in segments}
        for slot in set(range(sequences)).difference(slots.values()):
            self._cache.clear(slot, idle, idle + 1)
        for segment in segments:
            slot = self._cache.prepare(segment.row, batch.block_table[segment.row], segment.start, 1)
            ids[slot], positions[slot], lengths[slot] = batch.token_ids[segment.at], segment.start, segment.last + 1
        requested = batch.logit_rows[: batch.rows].tolist()
        wanted = [row for row, token in enumerate(requested) if token in slots]
        rows = np.array([slots[requested[row]] for row in wanted], np.int32)
        self._logits[wanted] = self._answers(ids, positions, lengths, rows)
