"""Runs steps through ONNX Runtime on a GPU: answers in one run for all slots, prompts in runs of one chunk."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from belle_compile.runtime.errors import EngineError, install
from belle_compile.runtime.executors.batch import StepBatch
from belle_compile.runtime.executors.cuda_device import open_device
from belle_compile.runtime.executors.device import Bytes, Device
from belle_compile.runtime.executors.device_blocks import DeviceBlocks, DeviceInputs, pool_blocks
from belle_compile.runtime.executors.kv_memory import KvMemory
from belle_compile.runtime.executors.kv_slots import Geometry, SlottedCache
from belle_compile.runtime.executors.onnxruntime_sizes import (
    ANSWERS,
    CHUNK_TOKENS,
    GPU_SEQUENCES,
    MODEL_NAME,
    PROMPTS,
    STAGE,
    Run,
    gpu_activation_bytes,
)
from belle_compile.runtime.executors.segments import Segment, divided
from belle_compile.runtime.program import BLOCK_SIZE, WEIGHTS_NAME

_DTYPES = {"tensor(float16)": np.float16, "tensor(float)": np.float32}


@dataclass(frozen=True)
class Placement:
    """Where ONNX Runtime computes: the execution provider, its name of the memory, its options, and those of the session.
    `stream_option` is the provider's option for the stream on which everything is enqueued; empty where there is none. With
    `preloads`, libraries of the provider are loaded first that were installed as Python packages."""

    provider: str
    memory: str
    options: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, str] = field(default_factory=dict)
    stream_option: str = ""
    preloads: bool = False


# Products of floats are not rounded to TF32. Attention is Flash Attention (1), Memory Efficient Attention (2), or unfused (16),
# the first of these that takes the model; by default cuDNN (8) would be used where it happens to be installed. Memory is taken
# as it is needed, and none of it is left to the CPU without a word.
GPU = Placement(
    "CUDAExecutionProvider",
    "cuda",
    options={"device_id": "0", "use_tf32": "0", "sdpa_kernel": str(1 | 2 | 16), "arena_extend_strategy": "kSameAsRequested"},
    config={"session.disable_cpu_ep_fallback": "1", "session.use_device_allocator_for_initializers": "1"},
    stream_option="user_compute_stream",
    preloads=True,
)


def providers() -> list[str]:
    """The execution providers that the installed ONNX Runtime was built with."""
    return list(onnxruntime.get_available_providers())


class OnnxRuntimeCudaExecutor:
    """One model with its KV cache on one GPU.

    Both kinds of runs have one shape. A run of answers computes a token in every slot of the cache: those without a token in
    the step compute one at position 0, whose block they give up. A chunk of a prompt is filled up with tokens that are written
    behind it. Tokens of answers and of prompts are computed by different kernels: see `StepBatch.answers_apart`.
    """

    def __init__(
        self, directory: Path, kv_memory: KvMemory, device: Device | None = None, placement: Placement | None = None
    ) -> None:
        """Load the model in `directory` (ENGINE/rank0) on `device`, by default the first GPU. The cache gets, by default, what
        the rest of the memory holds, up to that of the slots."""
        self._device, self._placement = device or open_device(), placement or GPU
        try:
            self._session = _load(directory / MODEL_NAME, self._placement, self._device.stream)
            self._prepare(kv_memory, (directory / WEIGHTS_NAME).stat().st_size)
        except BaseException:
            self._device.close()
            raise

    def _prepare(self, kv_memory: KvMemory, weight_bytes: int) -> None:
        device, metadata = self._device, self._session.get_modelmeta().custom_metadata_map
        facts = {name: int(value) for name, value in metadata.items() if value.isdecimal()}
        past = next(entry for entry in self._session.get_inputs() if entry.name.startswith("past_key_values"))
        _, kv_heads, capacity, head_dim = past.shape
        self._kv_dtype = np.dtype(_DTYPES[past.type])
        self._geometry = Geometry(facts["num_layers"], kv_heads, head_dim, capacity, self._kv_dtype.itemsize)
        self.vocab_size = facts["vocab_size"]
        self.kv_block_bytes = self._geometry.token_bytes * BLOCK_SIZE
        table_blocks = (capacity - CHUNK_TOKENS) // BLOCK_SIZE
        model = "model", weight_bytes + gpu_activation_bytes(facts)
        most = GPU_SEQUENCES * table_blocks
        self.num_blocks = pool_blocks(self._geometry, GPU_SEQUENCES, most, kv_memory, device, model, STAGE)
        version = onnxruntime.__version__
        self.kernels = f"onnxruntime-{version} {self._placement.provider} {device.arch} {device.name} {_environment_digest()}"
        self._memory = DeviceBlocks(self._geometry, GPU_SEQUENCES, self.num_blocks, device)
        self._cache = SlottedCache(self._memory, GPU_SEQUENCES, self.num_blocks, capacity // BLOCK_SIZE)
        names = {entry.name for entry in self._session.get_inputs()}
        self._answers, self._prompts = (_Inputs(run, names, self.vocab_size, device) for run in (ANSWERS, PROMPTS))
        self._bindings: dict[tuple[Run, int], Any] = {}
        self._logits = np.zeros((PROMPTS.rows, self.vocab_size), np.float32)
        tokens, positions, sequences = (np.zeros(CHUNK_TOKENS + GPU_SEQUENCES, np.int32) for _ in range(3))
        table = np.zeros((GPU_SEQUENCES, table_blocks), np.int32)
        self.batch = StepBatch(tokens, positions, sequences, table, np.zeros(PROMPTS.rows, np.int32), answers_apart=True)
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
        for name in ("batch", "_bindings", "_session", "_answers", "_prompts", "_cache", "_memory"):
            self.__dict__.pop(name, None)
        self._device.close()

    def _run_prompt(self, batch: StepBatch, segment: Segment) -> None:
        start, count = segment.start, segment.count
        slot = self._cache.prepare(segment.row, batch.block_table[segment.row], start, count)
        self._cache.clear(slot, start + count, start + CHUNK_TOKENS)
        ids, positions = np.zeros(CHUNK_TOKENS, np.int32), np.arange(start, start + CHUNK_TOKENS)
        ids[:count] = batch.token_ids[segment.at : segment.at + count]
        self._prompts.fill(ids, positions, positions[-1:], segment.last + 1)
        requested = batch.logit_rows[: batch.rows]
        wanted = np.flatnonzero((requested >= segment.at) & (requested < segment.at + count))
        self._run(self._prompts, slot, wanted, requested[wanted] - segment.at)

    def _run_answers(self, batch: StepBatch, segments: Sequence[Segment]) -> None:
        ids, positions, lengths = (np.full(GPU_SEQUENCES, value, np.int32) for value in (0, 0, 1))
        slots = {segment.at: self._cache.slot(segment.row) for segment in segments}
        for slot in set(range(GPU_SEQUENCES)).difference(slots.values()):
            self._cache.clear(slot, 0, 1)
        for segment in segments:
            slot = self._cache.prepare(segment.row, batch.block_table[segment.row], segment.start, 1)
            ids[slot], positions[slot], lengths[slot] = batch.token_ids[segment.at], segment.start, segment.last + 1
        self._answers.fill(ids, positions, positions, lengths)
        requested = batch.logit_rows[: batch.rows].tolist()
        wanted = np.array([row for row, token in enumerate(requested) if token in slots], np.int64)
        self._run(self._answers, 0, wanted, np.array([slots[requested[row]] for row in wanted.tolist()], np.int32))

    def _run(self, inputs: _Inputs, slot: int, wanted: NDArray[np.int64], rows: NDArray[np.int32]) -> None:
        """Run the model in the slots from `slot` on; the logits of its tokens `rows` become the rows `wanted` of the step."""
        inputs.upload(rows)
        try:
            self._session.run_with_iobinding(self._binding(inputs, slot))
        except Exception as error:
            raise EngineError(STAGE, "a step failed", found=str(error).strip()) from None
        self._logits[wanted] = inputs.download(len(wanted))

    def _binding(self, inputs: _Inputs, slot: int) -> Any:
        """The binding of a kind of run to its inputs and logits, and to the cache from a slot on, as inputs and, in place, as
        outputs."""
        key = inputs.run, slot
        if key not in self._bindings:
            self._bindings[key] = binding = self._session.io_binding()
            memory, g = self._placement.memory, self._geometry
            for name, array in inputs.arrays.items():
                binding.bind_input(name, memory, 0, np.int32, array.shape, inputs.addresses[name])
            shape = (inputs.run.sequences, g.kv_heads, g.capacity, g.head_dim)
            for layer in range(g.layers):
                for part, side in enumerate(("key", "value")):
                    place = self._kv_dtype, shape, self._memory.address(layer, part, slot)
                    binding.bind_input(f"past_key_values.{layer}.{side}", memory, 0, *place)
                    binding.bind_output(f"present.{layer}.{side}", memory, 0, *place)
            logits = (inputs.run.rows, self.vocab_size)
            binding.bind_output("logits", memory, 0, np.float32, logits, inputs.device_logits)
        return self._bindings[key]


class _Inputs:
    """The inputs and the logits of one kind of run, in memory of the host and of the device."""

    def __init__(self, run: Run, names: set[str], vocab_size: int, device: Device) -> None:
        """`names` are those of the model's inputs, of which some models lack some."""
        tokens, each = (run.sequences, run.tokens), (run.sequences,)
        shapes = {
            "input_ids": tokens,
            "positions": tokens,
            "last_positions": each,
            "rope_lengths": each,
            "logit_rows": (run.rows,),
        }
        inputs = DeviceInputs({name: (np.int32, shape) for name, shape in shapes.items() if name in names}, device)
        self.run, self._inputs, self._device = run, inputs, device
        self.arrays, self.addresses = inputs.arrays, inputs.addresses
        self._row_bytes = 4 * vocab_size
        self._host_logits: Bytes = device.host_memory(run.rows * self._row_bytes)
        self.device_logits = device.allocate(run.rows * self._row_bytes, "logits")

    def fill(self, ids: NDArray[Any], positions: NDArray[Any], last: NDArray[Any], lengths: NDArray[Any] | int) -> None:
        """Set the tokens, their positions, the last position of each sequence, and the lengths that dynamic RoPE depends on."""
        for name, values in (("input_ids", ids), ("positions", positions)):
            if name in self.arrays:
                self.arrays[name].reshape(-1)[:] = values
        for name, each in (("last_positions", last), ("rope_lengths", lengths)):
            if name in self.arrays:
                self.arrays[name][:] = each

    def upload(self, rows: NDArray[np.int32]) -> None:
        """Enqueue the copy of the inputs to the device; `rows` are the tokens whose logits are requested, in this order."""
        self.arrays["logit_rows"][:] = 0
        self.arrays["logit_rows"][: len(rows)] = rows
        self._inputs.upload()

    def download(self, rows: int) -> NDArray[np.float32]:
        """Wait for the run; returns the first `rows` rows of its logits, valid until the next run."""
        part = self._host_logits[: rows * self._row_bytes]
        if rows:
            self._device.download(part, self.device_logits)
        self._device.synchronize()
        return part.view(np.float32).reshape(rows, self._row_bytes // 4)


def _environment_digest() -> str:
    """A name of the environment variables by which ONNX Runtime chooses kernels."""
    chosen = sorted(f"{name}={value}" for name, value in os.environ.items() if name.startswith("ORT_"))
    return hashlib.sha256("\n".join(chosen).encode()).hexdigest()[:12]


def _load(path: Path, placement: Placement, stream: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    for name, value in placement.config.items():
        options.add_session_config_entry(name, value)
    if placement.preloads:
        with contextlib.redirect_stdout(sys.stderr):  # it prints which libraries it misses
            onnxruntime.preload_dlls()
    provider_options = dict(placement.options)
    if placement.stream_option:
        provider_options[placement.stream_option] = str(stream)
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=[(placement.provider, provider_options)])
    except Exception as error:
        remedy = f"see that the libraries of CUDA and cuDNN are there ({install('onnxruntime-gpu')}), or rebuild the engine"
        what = f"model {path} cannot be loaded on the GPU"
        raise EngineError(STAGE, what, found=str(error).strip(), remedy=remedy) from None
