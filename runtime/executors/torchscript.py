"""Runs a traced module through PyTorch, over mapped weights and a paged KV cache."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch  # noqa: TID251 (the engines that this executor runs need it)
from numpy.typing import NDArray

from belle_compile.runtime import host
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.executors.batch import StepBatch
from belle_compile.runtime.executors.kv_memory import KvMemory
from belle_compile.runtime.executors.torchscript_model import (
    MODEL_NAME,
    REMEDY,
    STAGE,
    STEP_ROWS,
    STEP_SEQUENCES,
    STEP_TOKENS,
    ModelFacts,
    StoredWeight,
)
from belle_compile.runtime.executors.torchscript_plan import plan_step
from belle_compile.runtime.memory import WeightsFile, anonymous
from belle_compile.runtime.program import BLOCK_SIZE, WEIGHTS_NAME


class TorchScriptExecutor:
    """One module with its weights and KV cache.

    The int8 weights of products are packed for PyTorch's kernels; other weights are read where the file is mapped. The keys of
    a layer are a tensor [blocks, tokens, heads, head_dim], and so are its values; the module writes to them in place.
    """

    def __init__(self, directory: Path, facts: ModelFacts, *, threads: int, kv_memory: KvMemory) -> None:
        """Load the module in `directory` (ENGINE/rank0); by default the cache gets half of the memory beside the weights."""
        self._facts, self.threads = facts, threads
        self.vocab_size, self.kv_block_bytes = facts.vocab_size, facts.block_bytes
        if any(weight.packed for weight in facts.weights.values()):
            check_products()
        self._weights = WeightsFile(directory / WEIGHTS_NAME)
        self._weights.require(facts.weights, facts.weights_header)
        self._module = _load(directory / MODEL_NAME)
        for name, weight in facts.weights.items():
            self._set(name, weight)
        max_blocks = -(-facts.max_position // BLOCK_SIZE)
        self.num_blocks = self._blocks(kv_memory, STEP_SEQUENCES * max_blocks)
        self._pools = self._allocate()
        capability = torch.backends.cpu.get_cpu_capability()
        self.kernels = " ".join([f"torch-{torch.__version__}", capability, *host.host_isas()[:1], host.processor()]).strip()
        tokens, positions, sequences = (np.zeros(STEP_TOKENS, np.int32) for _ in range(3))
        table = np.zeros((STEP_SEQUENCES, max_blocks), np.int32)
        self.batch = StepBatch(tokens, positions, sequences, table, np.zeros(STEP_ROWS, np.int32))

    def step(self, batch: StepBatch) -> NDArray[np.float32]:
        """Run `batch`; return float32 logits [rows, vocabulary]."""
        for source, destination in batch.copies:
            for pool in filter(torch.Tensor.numel, self._pools):
                pool[:, destination] = pool[:, source]
        if torch.get_num_threads() != self.threads:  # a number of each thread, and of other executors
            torch.set_num_threads(self.threads)
        plan = plan_step(batch, self._facts.tile, self._facts.num_kv_heads, self._facts.head_dim)
        graph_inputs = batch.token_ids[: batch.tokens], batch.positions[: batch.tokens], batch.logit_rows[: max(batch.rows, 1)]
        numbers = [torch.from_numpy(array.astype(np.int64)) for array in graph_inputs]
        numbers += [torch.from_numpy(array) for array in plan.arrays()]
        # Without optimizations: a module would be specialized to the shapes of the first steps, which takes seconds.
        with torch.inference_mode(), torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
            try:
                logits = self._module(*numbers, *self._pools)
            except RuntimeError as error:
                raise EngineError(STAGE, "PyTorch cannot run the step", found=_last_line(error)) from error
        result: NDArray[np.float32] = logits.numpy()
        return result[: batch.rows]  # kernels take no empty matrices

    def close(self) -> None:
        """Drop module, weights and cache. Memory is unmapped with the last tensor over it."""
        for name in ("_module", "_pools", "_weights", "batch"):
            with contextlib.suppress(AttributeError):
                delattr(self, name)

    def _blocks(self, kv_memory: KvMemory, most: int) -> int:
        """The number of blocks of the KV cache."""
        weights = self._weights.total_bytes
        free = host.memory_bytes() - weights
        asked = kv_memory.blocks(STAGE, free, f"the weights ({weights / 2**30:.2f} GiB)", self.kv_block_bytes)
        return asked if asked is not None else max(1, min(max(free, 0) // 2 // self.kv_block_bytes, most))

    def _allocate(self) -> list[torch.Tensor]:
        """Keys, values and their scales, for all layers each. Fresh memory holds zeros: masked keys must be finite."""
        facts = self._facts
        shape = (facts.num_layers, self.num_blocks, BLOCK_SIZE, facts.num_kv_heads)
        dtype = getattr(torch, facts.kv_dtype)
        scales = shape if facts.kv_dtype == "int8" else (facts.num_layers, 0, *shape[2:])
        return [_zeros((*shape, facts.head_dim), dtype) for _ in range(2)] + [_zeros(scales, torch.float32) for _ in range(2)]

    def _set(self, name: str, weight: StoredWeight) -> None:
        """Give the module a weight: a tensor over the mapped file, or a packed copy, after which mapped pages are released."""
        tensor = self._tensor(name, weight)
        if weight.attribute:
            setattr(self._module, weight.attribute, tensor)
        if weight.packed:
            setattr(self._module, weight.packed, torch.ops.onednn.qlinear_prepack(tensor, None))
            if not weight.attribute:
                self._weights.release(name)

    def _tensor(self, name: str, weight: StoredWeight) -> torch.Tensor:
        """A tensor over the mapped file, of which only the padding is left out."""
        at, dtype = self._weights.offset(name), np.dtype(weight.dtype)
        size = dtype.itemsize * int(np.prod(weight.shape))
        if size > self._weights.sizes[name]:
            found, expected = f"{self._weights.sizes[name]} bytes", f"{weight.dtype}{list(weight.shape)}"
            raise EngineError(STAGE, f"tensor {name} of {self._weights.path}", found=found, expected=expected, remedy=REMEDY)
        array = self._weights.contents[at : at + size].view(dtype).reshape(weight.shape)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nothing writes to it, though torch has no read-only tensors
            return torch.from_numpy(array)


def check_products() -> None:
    """Raise `EngineError` where PyTorch's sums of int8 products overflow: with kernels for processors without VNNI, which an
    environment variable selects too."""
    largest, scales = torch.full((16, 64), 127, dtype=torch.int8), torch.ones(16)
    packed, zeros = torch.ops.onednn.qlinear_prepack(largest, None), torch.zeros(16, dtype=torch.int32)
    for rows in (1, 8):
        unsigned = torch.full((rows, 64), 255, dtype=torch.uint8)
        found = torch.ops.onednn.qlinear_pointwise(
            unsigned, 1.0, 128, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        expected = 127 * 127 * 64
        if not bool((found == expected).all()):
            what = "PyTorch's products of int8 matrices overflow on this host"
            remedy = "unset ONEDNN_MAX_CPU_ISA if it is set, or build the engine with --backend tvm"
            raise EngineError(STAGE, what, found=f"{found.flatten()[0]:.0f}", expected=str(expected), remedy=remedy)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor whose pages take memory once they are written."""
    size = dtype.itemsize * int(np.prod(shape))
    return torch.from_numpy(anonymous(size)[:size]).view(dtype).reshape(shape)


def _load(path: Path) -> Any:
    """The module of an engine; raises `EngineError` where PyTorch cannot read it."""
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
