"""Runs steps through ONNX Runtime on a GPU."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from belle_compile.runtime.errors import EngineError, install
from belle_compile.runtime.executors.cuda_device import open_device
from belle_compile.runtime.executors.device import Bytes, Device
from belle_compile.runtime.executors.device_blocks import DeviceInputs
from belle_compile.runtime.executors.device_executor import DeviceExecutor, Floats, Integers, Runs
from belle_compile.runtime.executors.kv_memory import KvMemory
from belle_compile.runtime.executors.kv_slots import Geometry
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
from belle_compile.runtime.executors.segments import Segment
from belle_compile.runtime.program import WEIGHTS_NAME

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


class OnnxRuntimeCudaExecutor(DeviceExecutor):
    """One model that ONNX Runtime runs on one GPU."""

    def __init__(
        self, directory: Path, kv_memory: KvMemory, device: Device | None = None, placement: Placement | None = None
    ) -> None:
        """Load the model in `directory` (ENGINE/rank0) on `device`, by default the first GPU. The cache gets, by default, what
        the rest of the memory holds, up to that of the slots."""
        super().__init__(device or open_device())
        self._placement = placement or GPU
        try:
            self._session = _load(directory / MODEL_NAME, self._placement, self._device.stream)
            self._prepare_session(kv_memory, (directory / WEIGHTS_NAME).stat().st_size)
        except BaseException:
            self._device.close()
            raise

    def _prepare_session(self, kv_memory: KvMemory, weight_bytes: int) -> None:
        device, metadata = self._device, self._session.get_modelmeta().custom_metadata_map
        facts = {name: int(value) for name, value in metadata.items() if value.isdecimal()}
        past = next(entry for entry in self._session.get_inputs() if entry.name.startswith("past_key_values"))
        _, kv_heads, capacity, head_dim = past.shape
        self._kv_dtype = np.dtype(_DTYPES[past.type])
        self._geometry = Geometry(facts["num_layers"], kv_heads, head_dim, capacity, self._kv_dtype.itemsize)
        model = "model", weight_bytes + gpu_activation_bytes(facts)
        runs = Runs(GPU_SEQUENCES, CHUNK_TOKENS, PROMPTS.rows, idle_position=0)
        self._prepare(self._geometry, runs, facts["vocab_size"], kv_memory, model, STAGE)
        version = onnxruntime.__version__
        self.kernels = f"onnxruntime-{version} {self._placement.provider} {device.arch} {device.name} {_environment_digest()}"
        names = {entry.name for entry in self._session.get_inputs()}
        self._inputs = {run: _Inputs(run, names, self.vocab_size, device) for run in (ANSWERS, PROMPTS)}
        self._bindings: dict[tuple[Run, int], Any] = {}
        device.synchronize()

    def _unload(self) -> None:
        for name in ("_bindings", "_session", "_inputs"):
            self.__dict__.pop(name, None)

    def _prompt(self, ids: Integers, segment: Segment, slot: int, rows: Integers) -> Floats:
        positions = np.arange(segment.start, segment.start + CHUNK_TOKENS)
        self._inputs[PROMPTS].fill(ids, positions, positions[-1:], segment.last + 1)
        return self._run(PROMPTS, slot, rows)

    def _answers(self, ids: Integers, positions: Integers, lengths: Integers, rows: Integers) -> Floats:
        self._inputs[ANSWERS].fill(ids, positions, positions, lengths)
        return self._run(ANSWERS, 0, rows)

    def _run(self, run: Run, slot: int, rows: Integers) -> Floats:
        """Run the model in the slots from `slot` on; returns the logits of the run's tokens `rows`."""
        inputs = self._inputs[run]
        inputs.upload(rows)
        try:
            self._session.run_with_iobinding(self._binding(inputs, slot))
        except Exception as error:
            raise EngineError(STAGE, "a step failed", found=str(error).strip()) from None
        return inputs.download(len(rows))

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
