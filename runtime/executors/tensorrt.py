"""Runs steps through TensorRT for RTX on a GPU: answers in one run for all slots, prompts in runs of one chunk."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.executors.batch import StepBatch
from belle_compile.runtime.executors.cuda_device import open_device
from belle_compile.runtime.executors.device import Box, Bytes, Device, Pitches
from belle_compile.runtime.executors.kv_memory import KvMemory
from belle_compile.runtime.executors.kv_slots import SlottedCache
from belle_compile.runtime.executors.segments import Segment, divided
from belle_compile.runtime.executors.tensorrt_plan import (
    ANSWERS,
    CHUNK_ROWS,
    CHUNK_TOKENS,
    PLAN_NAME,
    PROFILES,
    PROMPTS,
    SEQUENCES,
    STAGE,
    PlanFacts,
    Profile,
    read_facts,
)
from belle_compile.runtime.executors.tensorrt_runtime import Plan, TensorRtPlan, check_installed
from belle_compile.runtime.host import GPU_RESERVE_BYTES
from belle_compile.runtime.program import BLOCK_SIZE

_ITEM_BYTES = {"float16": 2, "float32": 4}
_ALIGNMENT = 256  # bytes, of the addresses of inputs


class TensorRtExecutor:
    """A plan with its KV cache on one GPU.

    Both profiles have one shape. A run of answers computes a token in every slot of the cache: those without a token in the
    step compute one behind the longest sequence, which leaves no trace. A chunk of a prompt is filled up with tokens that are
    written behind it. Tokens of answers and of prompts are computed by different kernels: see `StepBatch.answers_apart`.
    """

    def __init__(self, directory: Path, kv_memory: KvMemory, device: Device | None = None, plan: Plan | None = None) -> None:
        """Load the plan in `directory` (ENGINE/rank0) on `device`, by default the first GPU; `plan` is that plan where it is
        loaded already. The cache gets, by default, what the rest of the memory holds."""
        self._facts = facts = read_facts(directory)
        check_installed(facts.tensorrt)
        self._device = device or open_device()
        try:
            if self._device.arch != facts.arch:
                found, remedy = f"{self._device.name} ({self._device.arch})", f"rebuild the engine for {self._device.arch}"
                raise EngineError(STAGE, "GPU", found=found, expected=facts.arch, remedy=remedy)
            self._plan = plan or TensorRtPlan(directory / PLAN_NAME, self._device.stream)
            self._prepare(kv_memory)
        except BaseException:
            self._device.close()
            raise

    def _prepare(self, kv_memory: KvMemory) -> None:
        facts, device = self._facts, self._device
        self.vocab_size = facts.vocab_size
        self.kv_block_bytes = facts.token_bytes * BLOCK_SIZE
        self.num_blocks = _blocks(facts, kv_memory, device)
        self.kernels = f"tensorrt-rtx-{facts.tensorrt} {facts.arch} {device.name}"
        self._memory = DeviceBlocks(facts, self.num_blocks, device)
        self._cache = SlottedCache(self._memory, SEQUENCES, self.num_blocks, facts.capacity // BLOCK_SIZE)
        self._runs = [_Run(facts, profile, number, self._plan, device) for number, profile in enumerate(PROFILES)]
        self._bind_cache(PROFILES.index(ANSWERS), 0)
        self._logits = np.zeros((CHUNK_ROWS, facts.vocab_size), np.float32)
        tokens, positions, sequences = (np.zeros(CHUNK_TOKENS + SEQUENCES, np.int32) for _ in range(3))
        table = np.zeros((SEQUENCES, facts.max_context // BLOCK_SIZE), np.int32)
        self.batch = StepBatch(tokens, positions, sequences, table, np.zeros(CHUNK_ROWS, np.int32), answers_apart=True)
        device.synchronize()

    def step(self, batch: StepBatch) -> NDArray[np.float32]:
        """Run `batch`; return float32 logits [rows, vocabulary], valid until the next step."""
        self._device.enter()  # engines run steps on a thread that did not load them
        for source, destination in batch.copies:
            self._cache.copy_block(source, destination)
        prompts, answers = divided(batch, CHUNK_TOKENS)
        for segment in prompts:
            self._run_prompt(batch, segment)
        for tokens in answers:
            self._run_answers(batch, tokens)
        return self._logits[: batch.rows]

    def close(self) -> None:
        """Free the GPU's memory."""
        self._device.enter()
        self._plan.close()
        for name in ("batch", "_runs", "_cache", "_memory"):  # arrays over memory that is freed now
            self.__dict__.pop(name, None)
        self._device.close()

    def _run_prompt(self, batch: StepBatch, segment: Segment) -> None:
        start, count = segment.start, segment.count
        slot = self._cache.prepare(segment.row, batch.block_table[segment.row], start, count)
        self._cache.clear(slot, start + count, start + CHUNK_TOKENS)
        number = PROFILES.index(PROMPTS)
        self._bind_cache(number, slot)
        inputs = self._runs[number].inputs
        inputs["input_ids"][:] = 0
        inputs["input_ids"][:count] = batch.token_ids[segment.at : segment.at + count]
        inputs["first_positions"][0] = start
        if "rope_lengths" in inputs:
            inputs["rope_lengths"][0] = segment.last + 1
        requested = batch.logit_rows[: batch.rows]
        wanted = np.flatnonzero((requested >= segment.at) & (requested < segment.at + count))
        inputs["logit_rows"][: len(wanted)] = requested[wanted] - segment.at
        self._logits[wanted] = self._runs[number].run()[: len(wanted)]

    def _run_answers(self, batch: StepBatch, segments: Sequence[Segment]) -> None:
        number = PROFILES.index(ANSWERS)
        inputs = self._runs[number].inputs
        inputs["input_ids"][:] = 0
        inputs["first_positions"][:] = self._facts.capacity - 1
        inputs["logit_rows"][:] = np.arange(SEQUENCES)
        slots = {}
        for segment in segments:
            slot = self._cache.prepare(segment.row, batch.block_table[segment.row], segment.start, 1)
            slots[segment.at] = slot
            inputs["input_ids"][slot] = batch.token_ids[segment.at]
            inputs["first_positions"][slot] = segment.start
            if "rope_lengths" in inputs:
                inputs["rope_lengths"][slot] = segment.last + 1
        logits = self._runs[number].run()
        for row, token in enumerate(batch.logit_rows[: batch.rows].tolist()):
            if token in slots:
                self._logits[row] = logits[slots[token]]

    def _bind_cache(self, number: int, slot: int) -> None:
        """Let a profile read and write the cache from a slot on. Outputs have the addresses of the inputs that they update."""
        for layer in range(self._facts.num_layers):
            for part, side in enumerate(("key", "value")):
                address = self._memory.address(layer, part, slot)
                self._plan.bind(number, f"past_key_values.{layer}.{side}", address)
                self._plan.bind(number, f"present.{layer}.{side}", address)


class _Run:
    """The inputs and the logits of a profile, in memory of the host and of the device. `inputs` are to be filled in."""

    def __init__(self, facts: PlanFacts, profile: Profile, number: int, plan: Plan, device: Device) -> None:
        self._number, self._plan, self._device = number, plan, device
        shapes: dict[str, tuple[type[np.signedinteger], int]] = {
            "input_ids": (np.int32, profile.sequences * profile.tokens),
            "first_positions": (np.int64, profile.sequences),
            "logit_rows": (np.int32, profile.rows),
        }
        if facts.dynamic_rope:
            shapes["rope_lengths"] = (np.int32, profile.sequences)
        places, size = {}, 0
        for name, (dtype, count) in shapes.items():
            places[name] = size
            size += -(-count * np.dtype(dtype).itemsize // _ALIGNMENT) * _ALIGNMENT
        self._memory, self._base = device.host_memory(size), device.allocate(size, "inputs")
        self.inputs: dict[str, NDArray[np.signedinteger]] = {}
        for name, (dtype, count) in shapes.items():
            plan.bind(number, name, self._base + places[name])
            self.inputs[name] = self._memory[places[name] :][: count * np.dtype(dtype).itemsize].view(dtype)
        shape = profile.rows, facts.vocab_size
        self._host_logits: Bytes = device.host_memory(4 * prod(shape))
        self._logits = self._host_logits.view(np.float32).reshape(shape)
        self._device_logits = device.allocate(4 * prod(shape), "logits")
        plan.bind(number, "logits", self._device_logits)

    def run(self) -> NDArray[np.float32]:
        """Run the profile; returns the logits [rows, vocabulary], valid until the next run."""
        self._device.upload(self._base, self._memory)
        self._plan.run(self._number)
        self._device.download(self._host_logits, self._device_logits)
        self._device.synchronize()
        return self._logits


class DeviceBlocks:
    """Memory of a GPU for a pool of blocks, [blocks, layers, 2, kv_heads, BLOCK_SIZE, head_dim], and for the slots, [layers, 2,
    SEQUENCES, kv_heads, capacity, head_dim]. It is zeroed, so that attention multiplies what it does not see by 0."""

    def __init__(self, facts: PlanFacts, blocks: int, device: Device) -> None:
        self._facts, self._device = facts, device
        self._head = facts.head_dim * _ITEM_BYTES[facts.floats]
        self._block_bytes = facts.token_bytes * BLOCK_SIZE
        self._slot_bytes = facts.num_kv_heads * facts.capacity * self._head  # of one layer, of keys or values
        self._slots = device.allocate(SEQUENCES * facts.capacity * facts.token_bytes, "the KV cache")
        self._pool = device.allocate(blocks * self._block_bytes, "the KV cache")

    def address(self, layer: int, part: int, slot: int) -> int:
        """The address of a slot's keys (`part` 0) or values (1) of a layer; those of the next slots follow."""
        return self._slots + ((2 * layer + part) * SEQUENCES + slot) * self._slot_bytes

    def copy(self, source: int, destination: int) -> None:
        self._device.copy(self._in_pool(destination), self._in_pool(source), self._block_bytes)

    def load(self, block: int, slot: int, place: int) -> None:
        target, source = self._in_slot(slot, place), self._in_pool(block)
        self._device.copy_box(target, self._slot_pitches, source, self._pool_pitches, self._box)

    def store(self, slot: int, place: int, block: int) -> None:
        target, source = self._in_pool(block), self._in_slot(slot, place)
        self._device.copy_box(target, self._pool_pitches, source, self._slot_pitches, self._box)

    @property
    def _box(self) -> Box:
        """A block as layers and parts, heads, and bytes that lie together."""
        return 2 * self._facts.num_layers, self._facts.num_kv_heads, BLOCK_SIZE * self._head

    @property
    def _slot_pitches(self) -> Pitches:
        """Heads from a layer's part to the next one, and bytes from a head to the next one."""
        return SEQUENCES * self._facts.num_kv_heads, self._facts.capacity * self._head

    @property
    def _pool_pitches(self) -> Pitches:
        return self._facts.num_kv_heads, BLOCK_SIZE * self._head

    def _in_pool(self, block: int) -> int:
        return self._pool + block * self._block_bytes

    def _in_slot(self, slot: int, place: int) -> int:
        return self.address(0, 0, slot) + place * BLOCK_SIZE * self._head


def _blocks(facts: PlanFacts, kv_memory: KvMemory, device: Device) -> int:
    """The number of blocks of the pool, by default what the rest of the device's memory holds; raises `EngineError` where the
    cache does not fit."""
    slots, block = SEQUENCES * facts.capacity * facts.token_bytes, facts.token_bytes * BLOCK_SIZE
    free = device.memory_bytes - facts.plan_bytes - slots - GPU_RESERVE_BYTES
    most = SEQUENCES * facts.max_context // BLOCK_SIZE
    if kv_memory == KvMemory():
        if free >= block:
            return min(free // block, most)
        kv_memory = KvMemory(tokens=BLOCK_SIZE)  # the least
    sizes = f"the plan ({facts.plan_bytes / 2**30:.2f} GiB) and the slots ({slots / 2**30:.2f} GiB) on {device.name}"
    blocks = kv_memory.blocks(STAGE, free, sizes, block)
    assert blocks is not None, "a size is asked for"
    return blocks
