"""Runs steps through TensorRT for RTX on a GPU: answers in one run for all slots, prompts in runs of one chunk."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.executors.batch import StepBatch
from belle_compile.runtime.executors.cuda_device import open_device
from belle_compile.runtime.executors.device import Bytes, Device
from belle_compile.runtime.executors.device_blocks import DeviceBlocks, DeviceInputs, pool_blocks
from belle_compile.runtime.executors.kv_memory import KvMemory
from belle_compile.runtime.executors.kv_slots import Geometry, SlottedCache
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
from belle_compile.runtime.program import BLOCK_SIZE

_ITEM_BYTES = {"float16": 2, "float32": 4}


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
        layers, heads, item_bytes = facts.num_layers, facts.num_kv_heads, _ITEM_BYTES[facts.floats]
        geometry = Geometry(layers, heads, facts.head_dim, facts.capacity, item_bytes)
        most = SEQUENCES * facts.max_context // BLOCK_SIZE
        self.num_blocks = pool_blocks(geometry, SEQUENCES, most, kv_memory, device, ("plan", facts.plan_bytes), STAGE)
        self.kernels = f"tensorrt-rtx-{facts.tensorrt} {facts.arch} {device.name}"
        self._memory = DeviceBlocks(geometry, SEQUENCES, self.num_blocks, device)
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
        shapes: dict[str, tuple[type[np.signedinteger[Any]], tuple[int, ...]]] = {
            "input_ids": (np.int32, (profile.sequences * profile.tokens,)),
            "first_positions": (np.int64, (profile.sequences,)),
            "logit_rows": (np.int32, (profile.rows,)),
        }
        if facts.dynamic_rope:
            shapes["rope_lengths"] = (np.int32, (profile.sequences,))
        self._inputs = DeviceInputs(shapes, device)
        self.inputs = self._inputs.arrays
        for name, address in self._inputs.addresses.items():
            plan.bind(number, name, address)
        shape = profile.rows, facts.vocab_size
        self._host_logits: Bytes = device.host_memory(4 * prod(shape))
        self._logits = self._host_logits.view(np.float32).reshape(shape)
        self._device_logits = device.allocate(4 * prod(shape), "logits")
        plan.bind(number, "logits", self._device_logits)

    def run(self) -> NDArray[np.float32]:
        """Run the profile; returns the logits [rows, vocabulary], valid until the next run."""
        self._inputs.upload()
        self._plan.run(self._number)
        self._device.download(self._host_logits, self._device_logits)
        self._device.synchronize()
        return self._logits
