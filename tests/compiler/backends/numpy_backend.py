"""A backend of one file: it stores the graph as ONNX with the engine's weights, and runs it by the NumPy meanings of its ops.

Importing it registers the backend and its executor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from belle_compile.compiler import backends
from belle_compile.compiler.backends import Backend, CompileOptions, Footprint, Payload
from belle_compile.compiler.backends.base import PROCESS_BYTES, KVCache, Passes, tensor_bytes
from belle_compile.compiler.devices import Device, Target
from belle_compile.compiler.ir.evaluate import PagedCache, evaluate
from belle_compile.compiler.ir.signature import dtype_name
from belle_compile.compiler.ir.text import from_onnx, to_onnx
from belle_compile.compiler.kv_types import AUTO
from belle_compile.passes.presets import Recipe
from belle_compile.runtime.artifact import KernelCalls
from belle_compile.runtime.executors import ExecutorFactory, LoadRequest, StepBatch, register_executor
from belle_compile.runtime.executors.kv_memory import KvMemory
from belle_compile.runtime.host import memory_bytes
from belle_compile.runtime.memory import WeightsFile
from belle_compile.runtime.program import ALIGNMENT, BLOCK_SIZE, KV_DTYPES, SCALES_BYTES, WEIGHTS_NAME

Array = npt.NDArray[Any]

NAME, MODEL = "numpy", "model.onnx"
KV_CACHE = "kv_cache"  # of the graph's metadata
STEP_TOKENS, STEP_ROWS, STEP_SEQUENCES = 24, 6, 4


@dataclass(frozen=True)
class FlatTensor:
    """A weight as one row, padded to whole cache lines; int4 is stored as int8."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pack: Callable[[], Array]


class NumpyBackend(Backend):
    """Serves processors with one rank; carries the rotations that are folded into weights, and one fusion."""

    name = NAME
    kv_types = tuple(KV_DTYPES)

    def isas(self, device: Device) -> tuple[str, ...]:
        return device.isas if device.arch else ()

    def passes(self, recipe: Recipe) -> Passes:
        return Passes(frozenset({"rotate"}), frozenset({"fuse-projections"}))

    def refusal(self, target: Target, recipe: Recipe) -> str:
        return "several ranks, where it runs in one process" if target.ranks > 1 else super().refusal(target, recipe)

    def footprint(self, graphs: Sequence[ir.Model], target: Target, kv_cache: str = AUTO) -> list[Footprint]:
        return [self._footprint(graph, kv_cache) for graph in graphs]

    def compile(self, graphs: Sequence[ir.Model], target: Target, options: CompileOptions) -> list[Payload]:
        return [self._payload(graph, options) for graph in graphs]

    def _payload(self, graph: ir.Model, options: CompileOptions) -> Payload:
        footprint, stored = self._footprint(graph, options.kv_cache), graph.clone()
        stored.metadata_props[KV_CACHE] = footprint.kv.dtype
        return Payload(
            files={MODEL: to_onnx(stored)},
            weights=[_weights(graph)],
            footprint=footprint,
            kernel_calls=KernelCalls(options.unfused_calls, self.kernel_calls(graph)),
            toolchain={"meanings": np.__version__},
        )

    def _footprint(self, graph: ir.Model, kv_cache: str) -> Footprint:
        facts = graph.metadata_props
        layers, kv_heads, head_dim = (int(facts[key]) for key in ("num_layers", "num_kv_heads", "head_dim"))
        dtype = "float32" if kv_cache == AUTO else kv_cache
        head = BLOCK_SIZE * head_dim * KV_DTYPES[dtype] + (SCALES_BYTES if dtype == "int8" else 0)
        kv = KVCache(dtype, 2 * layers * kv_heads * head, BLOCK_SIZE, int(facts["max_position"]))
        activations = 4 * STEP_TOKENS * int(facts["hidden_size"]) * sum(1 for _ in graph.graph)
        return Footprint(sum(map(tensor_bytes, _weights(graph))), activations, PROCESS_BYTES, kv)


def _weights(graph: ir.Model) -> list[FlatTensor]:
    found = []
    for name, value in graph.graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None
        if tensor.dtype != ir.DataType.INT64:  # the sizes of Split are in the graph
            found.append(_flat(name, tensor))
    return found


def _flat(name: str, tensor: ir.TensorProtocol) -> FlatTensor:
    dtype = _stored(tensor.dtype)
    size, items = prod(tensor.shape.numpy()), ALIGNMENT // np.dtype(dtype).itemsize

    def pack() -> Array:
        padded = np.zeros(-(-size // items) * items, dtype)
        padded[:size] = tensor.numpy().astype(dtype).reshape(-1)
        return padded

    return FlatTensor(name, dtype, (-(-size // items) * items,), pack)


def _stored(dtype: ir.DataType) -> str:
    return "int8" if dtype == ir.DataType.INT4 else dtype_name(dtype)


class NumpyExecutor:
    """Evaluates the graph for each step over a paged cache of NumPy arrays."""

    def __init__(self, rank: Path, kv_memory: KvMemory) -> None:
        self._weights = WeightsFile(rank / WEIGHTS_NAME)
        self._graph = from_onnx((rank / MODEL).read_bytes(), self._tensor)
        facts = self._graph.metadata_props
        layers, kv_heads, head_dim, context = (
            int(facts[key]) for key in ("num_layers", "num_kv_heads", "head_dim", "max_position")
        )
        blocks = -(-context // BLOCK_SIZE)
        block_bytes = 2 * layers * kv_heads * head_dim * BLOCK_SIZE * np.dtype(facts[KV_CACHE]).itemsize
        asked = kv_memory.blocks(NAME, memory_bytes() - self._weights.total_bytes, "the weights", block_bytes)
        self.num_blocks = STEP_SEQUENCES * blocks if asked is None else asked
        self._cache = PagedCache(layers, kv_heads, head_dim, self.num_blocks, facts[KV_CACHE])
        self.vocab_size = int(facts["vocab_size"])
        self.kernels = f"numpy {np.__version__}"
        self.kv_block_bytes = sum(part.nbytes for part in (self._cache.k, self._cache.v)) // self.num_blocks
        tokens, positions, sequences = (np.zeros(STEP_TOKENS, np.int32) for _ in range(3))
        table = np.zeros((STEP_SEQUENCES, blocks), np.int32)
        self.batch = StepBatch(tokens, positions, sequences, table, np.zeros(STEP_ROWS, np.int32))

    def step(self, batch: StepBatch) -> npt.NDArray[np.float32]:
        for source, destination in batch.copies:
            for part in (self._cache.k, self._cache.v, self._cache.k_scales, self._cache.v_scales):
                part[:, destination] = part[:, source]
        inputs = {
            "token_ids": batch.token_ids[: batch.tokens],
            "positions": batch.positions[: batch.tokens],
            "sequences": batch.sequences[: batch.tokens],
            "block_table": batch.block_table,
            "logit_rows": batch.logit_rows[: batch.rows],
        }
        logits: npt.NDArray[np.float32] = evaluate(self._graph, inputs, self._cache)["logits"]
        return logits

    def close(self) -> None:
        del self._cache

    def _tensor(self, name: str, shape: Sequence[int], dtype: ir.DataType) -> ir.TensorProtocol:
        at, size = self._weights.offset(name), self._weights.sizes[name]
        stored = self._weights.contents[at : at + size].view(_stored(dtype))
        return ir.Tensor(stored[: prod(shape)].reshape(shape).astype(dtype.numpy()), dtype=dtype, name=name)


class NumpyFactory(ExecutorFactory):
    """Loads `NumpyExecutor`s."""

    def load(self, request: LoadRequest) -> NumpyExecutor:
        return NumpyExecutor(request.directory, request.kv_memory)


backends.register(NumpyBackend())
register_executor(NAME, NumpyFactory())
