"""Runs a traced module through PyTorch, over mapped weights and a paged KV cache."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch  # noqa: TID251 (the engines that this executor runs need it)
from numpy.typing import NDArray

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.executors.batch import StepBatch
from belle_compile.runtime.executors.cpu import allocate_inputs, choose_isa, kernels_path, kv_blocks
from belle_compile.runtime.executors.kv_memory import KvMemory
from belle_compile.runtime.executors.native import KernelLibrary
from belle_compile.runtime.executors.torchscript_model import INPUTS, REMEDY, STAGE, attribute_of, model_name
from belle_compile.runtime.memory import WeightsFile, anonymous
from belle_compile.runtime.program import WEIGHTS_NAME
from belle_compile.runtime.program_json import check_seal, read_program


class TorchScriptExecutor:
    """One module with its weights, arena and KV cache.

    The engine's library makes its kernels operators of PyTorch, which the module calls. All memory is mapped here; the module
    gets tensors over it, and writes to them in place.
    """

    def __init__(
        self, directory: Path, carried: tuple[str, ...], *, threads: int, isa: str | None, kv_memory: KvMemory
    ) -> None:
        """Load the module in `directory` (ENGINE/rank0) of an engine with kernels for the `carried` instruction sets; `isa` and
        `kv_memory` are as for `CpuExecutor`."""
        self.isa, self.threads = choose_isa(carried, isa), threads
        program = read_program(directory)
        path = kernels_path(directory, self.isa)
        check_seal(directory, path)
        self.vocab_size, self.kv_block_bytes = program.vocab_size, program.kv.block_bytes
        self._weights = WeightsFile(directory / WEIGHTS_NAME)
        self._weights.require(program.weight_names(), program.weights_header)
        self.num_blocks = kv_blocks(program, kv_memory, self._weights.total_bytes, 1)
        self.kernels = path.stem  # a tuned library may add in another order than the general one
        KernelLibrary(path)
        self._module = _load(directory / model_name(path.name))
        for name in program.weight_names():
            setattr(self._module, attribute_of(name), self._tensor(name))
        inputs = allocate_inputs(program)
        self._tokens, self._rows = inputs["T"], inputs["R"]
        table = inputs["block_table"].reshape(program.max_sequences, program.max_blocks)
        self.batch = StepBatch(inputs["token_ids"], inputs["positions"], inputs["sequences"], table, inputs["logit_rows"])
        cache = anonymous(self.num_blocks * program.kv.block_bytes)
        self._kv_blocks = cache[: self.num_blocks * program.kv.block_bytes].reshape(self.num_blocks, -1)
        memories = {"arena": anonymous(program.arena_bytes).view(np.float32), "cache": cache} | inputs
        self._tensors = [torch.from_numpy(memories[name]) for name in INPUTS]

    def step(self, batch: StepBatch) -> NDArray[np.float32]:
        """Run `batch`; return float32 logits [rows, vocabulary] in the arena, valid until the next step."""
        self._tokens[0], self._rows[0] = batch.tokens, batch.rows
        for source, destination in batch.copies:
            self._kv_blocks[destination] = self._kv_blocks[source]
        if torch.get_num_threads() != self.threads:  # a number of each thread, and of other executors
            torch.set_num_threads(self.threads)
        # Without optimizations: there is nothing to fuse, and PyTorch would look for it in the first steps.
        with torch.inference_mode(), torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
            try:
                logits = self._module(*self._tensors)
            except RuntimeError as error:
                raise EngineError(STAGE, "PyTorch cannot run the step", found=_last_line(error)) from error
        result: NDArray[np.float32] = logits.numpy()
        return result[: batch.rows]

    def close(self) -> None:
        """Drop module, weights and cache. Memory is unmapped with the last tensor over it."""
        for name in ("_module", "_tensors", "_kv_blocks", "_weights", "_tokens", "_rows", "batch"):
            with contextlib.suppress(AttributeError):
                delattr(self, name)

    def _tensor(self, name: str) -> torch.Tensor:
        """The bytes of a tensor in the mapped file."""
        start, size = self._weights.offset(name), self._weights.sizes[name]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nothing writes to it, though torch has no read-only tensors
            return torch.from_numpy(self._weights.contents[start : start + size])


def _load(path: Path) -> Any:
    """The module of an engine; raises `EngineError` where PyTorch cannot read it."""
    if not path.is_file():
        raise EngineError("engine", f"file {path} is missing", remedy=REMEDY)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        try:
            return torch.jit.load(str(path), map_location="cpu").eval()  # type: ignore[no-untyped-call]
        except (RuntimeError, ValueError) as error:
            what = f"PyTorch {torch.__version__} cannot load {path}"
            raise EngineError(STAGE, what, found=_last_line(error), remedy=REMEDY) from error


def _last_line(error: Exception) -> str:
    """The last line of an error of PyTorch, which names the cause; the lines before it show code."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
