"""Runs steps through TensorRT on a GPU."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.executors.cuda_device import open_device
from belle_compile.runtime.executors.device import Bytes, Device
from belle_compile.runtime.executors.device_blocks import DeviceInputs
from belle_compile.runtime.executors.device_executor import DeviceExecutor, Floats, Integers, Runs
from belle_compile.runtime.executors.kv_memory import KvMemory
from belle_compile.runtime.executors.kv_slots import Geometry
from belle_compile.runtime.executors.segments import Segment
from belle_compile.runtime.executors.tensorrt_library import STAGE, runtime_for
from belle_compile.runtime.executors.tensorrt_plan import (
    ANSWERS,
    CHUNK_ROWS,
    CHUNK_TOKENS,
    PLAN_NAME,
    PROFILES,
    PROMPTS,
    SEQUENCES,
    PlanFacts,
    Profile,
    read_facts,
)
from belle_compile.runtime.executors.tensorrt_runtime import Plan, TensorRtPlan

_ITEM_BYTES = {"float16": 2, "float32": 4}


class TensorRtExecutor(DeviceExecutor):
    """A plan that TensorRT runs on one GPU. A slot without a token computes one behind the longest sequence, which leaves no
    trace."""

    def __init__(self, directory: Path, kv_memory: KvMemory, device: Device | None = None, plan: Plan | None = None) -> None:
        """Load the plan in `directory` (ENGINE/rank0) on `device`, by default the first GPU; `plan` is that plan where it is
        loaded already. The cache gets, by default, what the rest of the memory holds."""
        self._facts = facts = read_facts(directory)
        self._installed = installed = runtime_for(facts.library, facts.version, facts.version_compatible)
        super().__init__(device or open_device())
        try:
            if self._device.arch != facts.arch:
                found, remedy = f"{self._device.name} ({self._device.arch})", f"rebuild the engine for {self._device.arch}"
                raise EngineError(STAGE, "GPU", found=found, expected=facts.arch, remedy=remedy)
            self._plan = plan or TensorRtPlan(
                directory / PLAN_NAME, self._device.stream, installed.package, facts.version_compatible
            )
            self._prepare_plan(kv_memory)
        except BaseException:
            self._device.close()
            raise

    def _prepare_plan(self, kv_memory: KvMemory) -> None:
        facts, device = self._facts, self._device
        layers, heads, item_bytes = facts.num_layers, facts.num_kv_heads, _ITEM_BYTES[facts.floats]
        geometry = Geometry(layers, heads, facts.head_dim, facts.capacity, item_bytes)
        runs = Runs(SEQUENCES, CHUNK_TOKENS, CHUNK_ROWS, idle_position=facts.capacity - 1)
        self._prepare(geometry, runs, facts.vocab_size, kv_memory, ("plan", facts.plan_bytes), STAGE)
        self.kernels = f"{self._installed.package.name}-{self._installed.version} {facts.arch} {device.name}"
        self._runs = {profile: _Run(facts, profile, number, self._plan, device) for number, profile in enumerate(PROFILES)}
        self._bind_cache(ANSWERS, 0)
        device.synchronize()

    def _unload(self) -> None:
        self._plan.close()
        self.__dict__.pop("_runs", None)

    def _prompt(self, ids: Integers, segment: Segment, slot: int, rows: Integers) -> Floats:
        self._bind_cache(PROMPTS, slot)
        run = self._runs[PROMPTS]
        run.fill(ids, segment.start, segment.last + 1)
        return run.logits_of(rows)

    def _answers(self, ids: Integers, positions: Integers, lengths: Integers, rows: Integers) -> Floats:
        run = self._runs[ANSWERS]
        run.fill(ids, positions, lengths)
        return run.logits_of(rows)

    def _bind_cache(self, profile: Profile, slot: int) -> None:
        """Let a profile read and write the cache from a slot on. Outputs have the addresses of the inputs that they update."""
        number = PROFILES.index(profile)
        for layer in range(self._facts.num_layers):
            for part, side in enumerate(("key", "value")):
                address = self._memory.address(layer, part, slot)
                self._plan.bind(number, f"past_key_values.{layer}.{side}", address)
                self._plan.bind(number, f"present.{layer}.{side}", address)


class _Run:
    """The inputs and the logits of a profile, in memory of the host and of the device."""

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
        for name, address in self._inputs.addresses.items():
            plan.bind(number, name, address)
        shape = profile.rows, facts.vocab_size
        self._host_logits: Bytes = device.host_memory(4 * prod(shape))
        self._logits = self._host_logits.view(np.float32).reshape(shape)
        self._device_logits = device.allocate(4 * prod(shape), "logits")
        plan.bind(number, "logits", self._device_logits)

    def fill(self, ids: Integers, first: Integers | int, lengths: Integers | int) -> None:
        """Set the tokens, the position of each sequence's first one, and the lengths that dynamic RoPE depends on."""
        arrays = self._inputs.arrays
        arrays["input_ids"][:] = ids
        arrays["first_positions"][:] = first
        if "rope_lengths" in arrays:
            arrays["rope_lengths"][:] = lengths

    def logits_of(self, rows: Integers) -> Floats:
        """Run the profile; returns the logits of the run's tokens `rows`, valid until the next run."""
        requested = self._inputs.arrays["logit_rows"]
        requested[:] = 0
        requested[: len(rows)] = rows
        self._inputs.upload()
        self._plan.run(self._number)
        self._device.download(self._host_logits, self._device_logits)
        self._device.synchronize()
        return self._logits[: len(rows)]
