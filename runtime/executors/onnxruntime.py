"""Runs steps through ONNX Runtime: answers in one run for all sequences, prompts in runs of their own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from belle_compile.runtime import host
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.executors.batch import StepBatch
from belle_compile.runtime.executors.kv_memory import KvMemory
from belle_compile.runtime.executors.kv_slots import Geometry, KvSlots
from belle_compile.runtime.executors.onnxruntime_sizes import (
    CHUNK_TOKENS,
    MODEL_NAME,
    STAGE,
    STEP_ROWS,
    STEP_SEQUENCES,
    STEP_TOKENS,
)
from belle_compile.runtime.executors.segments import Segment, divided
from belle_compile.runtime.program import BLOCK_SIZE, WEIGHTS_NAME
from belle_compile.runtime.serving.kv_blocks import blocks_for

PROVIDERS = ("CPUExecutionProvider",)
_BINDINGS = 256  # ranges of slots whose bindings are kept


class OnnxRuntimeExecutor:
    """One model with its KV cache.

    ONNX Runtime's attention takes the tokens of a sequence in tiles, and adds products in another order where a tile has one
    token than where it has several. Tiles have twice as many tokens as a head has numbers, or an even part of the second-level
    cache. So tokens of prompts are always computed in even numbers, if need be with a token that is dropped, and tokens of
    answers always alone: then the bits of a token depend on the tokens before it and on the length of the prompt, and not on
    the step (`StepBatch.answers_apart`).
    """

    def __init__(self, directory: Path, threads: int, kv_memory: KvMemory) -> None:
        """Load the model in `directory` (ENGINE/rank0); by default the cache gets half of the memory beside the weights."""
        self._session = _load(directory / MODEL_NAME, threads)
        facts = self._session.get_modelmeta().custom_metadata_map
        layers, context, self.vocab_size = (int(facts[key]) for key in ("num_layers", "max_position", "vocab_size"))
        _, kv_heads, _, head_dim = next(i.shape for i in self._session.get_inputs() if i.name.startswith("past_key_values"))
        self._dynamic_rope = "dynamic_rope_from" in facts
        table_blocks = blocks_for(context)
        geometry = Geometry(layers, kv_heads, head_dim, (table_blocks + 1) * BLOCK_SIZE)
        self.kv_block_bytes = 2 * BLOCK_SIZE * geometry.token_bytes  # in the pool, and in a slot
        weights = (directory / WEIGHTS_NAME).stat().st_size
        self.num_blocks = kv_memory.blocks_beside_weights(
            STAGE, host.memory_bytes(), weights, self.kv_block_bytes, context=context, most=STEP_SEQUENCES * table_blocks
        )
        rows = min(STEP_SEQUENCES, self.num_blocks)
        self._cache = KvSlots(geometry, rows, self.num_blocks)
        self.kernels = f"onnxruntime-{onnxruntime.__version__} {PROVIDERS[0]} {_processor_digest()}"
        tokens, positions, sequences = (np.zeros(STEP_TOKENS, np.int32) for _ in range(3))
        table = np.zeros((rows, table_blocks), np.int32)
        self.batch = StepBatch(
            tokens, positions, sequences, table, np.zeros(STEP_ROWS, np.int32), answers_apart=True, blocks_per_row=True
        )
        self._logits, self._run_logits = (np.zeros((STEP_ROWS, self.vocab_size), np.float32) for _ in range(2))
        self._bindings: dict[tuple[int, int], _Binding] = {}

    def step(self, batch: StepBatch) -> NDArray[np.float32]:
        """Run `batch`; return float32 logits [rows, vocabulary], valid until the next step."""
        for source, destination in batch.copies:
            self._cache.copy_block(source, destination)
        requested = batch.logit_rows[: batch.rows]
        prompts, answers = divided(batch, CHUNK_TOKENS)
        self._cache.make_room({segment.row: blocks_for(segment.last + 1) for segment in chain(prompts, *answers)})
        for segment in prompts:
            self._run_prompt(batch, segment, requested)
        for tokens in answers:
            self._run_answers(batch, tokens, requested)
        return self._logits[: batch.rows]

    def close(self) -> None:
        """Drop the model and the cache."""
        for name in ("_bindings", "_session", "_cache", "_logits", "_run_logits", "batch"):
            self.__dict__.pop(name, None)

    def _run_prompt(self, batch: StepBatch, segment: Segment, requested: NDArray[np.int32]) -> None:
        """Compute tokens of a prompt; an odd number of them gets the last one once more, which leaves no trace."""
        slot = self._cache.prepare(segment.row, batch.block_table[segment.row], segment.start, segment.count)
        ids = batch.token_ids[segment.at : segment.at + segment.count]
        extra = [(slot, segment.start + segment.count)] if segment.count % 2 else []
        if extra:
            ids = np.append(ids, ids[-1])
        last = segment.start + len(ids) - 1
        wanted = np.flatnonzero((requested >= segment.at) & (requested < segment.at + segment.count))
        with _Kept(self._cache.slots, extra):
            self._run(slot, ids[None], [last], [segment.last + 1], wanted, requested[wanted] - segment.at)

    def _run_answers(self, batch: StepBatch, segments: Sequence[Segment], requested: NDArray[np.int32]) -> None:
        """Compute one token of each answer, in neighbouring slots. Slots of other sequences among them compute a token at
        position 0, which leaves no trace."""
        first, count = self._cache.gather([segment.row for segment in segments])
        ids, last, lengths = np.zeros(count, np.int32), np.zeros(count, np.int32), np.ones(count, np.int32)
        index_of = {}
        for segment in segments:
            slot = self._cache.prepare(segment.row, batch.block_table[segment.row], segment.start, 1)
            index_of[segment.at] = index = slot - first
            ids[index], last[index], lengths[index] = batch.token_ids[segment.at], segment.start, segment.last + 1
        others = set(range(count)).difference(index_of.values())
        wanted = np.array([row for row, token in enumerate(requested.tolist()) if token in index_of], np.int64)
        rows = np.array([index_of[token] for token in requested[wanted].tolist()], np.int32)
        with _Kept(self._cache.slots, [(first + index, 0) for index in others]):
            self._run(first, ids[:, None], last, lengths, wanted, rows)

    def _run(
        self,
        first: int,
        token_ids: NDArray[np.int32],
        last: Sequence[int] | NDArray[np.int32],
        lengths: Sequence[int] | NDArray[np.int32],
        wanted: NDArray[np.int64],
        rows: NDArray[np.int32],
    ) -> None:
        """Run the model for `token_ids` [B, S] in the slots from `first` on; the logits of its tokens `rows` become the rows
        `wanted` of the step. Where none are requested, those of one token are computed and dropped, because ONNX Runtime
        reduces no empty tensors."""
        binding = self._binding(first, len(token_ids))
        rows = rows if len(rows) else np.zeros(1, np.int32)
        inputs = {"input_ids": token_ids, "last_positions": last, "total_length": max(last) + 1, "logit_rows": rows}
        if self._dynamic_rope:
            inputs["rope_lengths"] = lengths
        for name, values in inputs.items():
            binding.fill(name, np.asarray(values, np.int32))
        together = len(wanted) > 0 and int(wanted[-1] - wanted[0]) == len(wanted) - 1
        logits = self._logits[wanted[0] : wanted[-1] + 1] if together else self._run_logits[: len(rows)]
        binding.answer_in(logits)
        try:
            self._session.run_with_iobinding(binding.of_session)
        except Exception as error:
            raise EngineError(STAGE, "a step failed", found=str(error).strip()) from None
        if not together:
            self._logits[wanted] = logits[: len(wanted)]

    def _binding(self, first: int, count: int) -> _Binding:
        """The binding of the cache's slots first..first + count."""
        key = first, count
        if key not in self._bindings:
            if len(self._bindings) == _BINDINGS:
                self._bindings.clear()
            self._bindings[key] = _Binding(self._session.io_binding(), self._cache.slots[:, :, first : first + count])
        return self._bindings[key]


class _Binding:
    """Some slots of the cache as inputs and, in place, as outputs of a session, with the other inputs and the logits.

    An input keeps its memory, and the logits their place, until another one is asked for: in most steps of answers ONNX Runtime
    is told nothing new. `of_session` is ONNX Runtime's own object.
    """

    def __init__(self, of_session: Any, slots: NDArray[np.float32]) -> None:
        self.of_session = of_session
        self._inputs: dict[str, NDArray[np.int32]] = {}
        self._logits_at: tuple[int, tuple[int, ...]] | None = None
        for layer, parts in enumerate(slots):
            for name, part in zip(("key", "value"), parts, strict=True):
                place = np.float32, part.shape, part.ctypes.data
                of_session.bind_input(f"past_key_values.{layer}.{name}", "cpu", 0, *place)
                of_session.bind_output(f"present.{layer}.{name}", "cpu", 0, *place)

    def fill(self, name: str, values: NDArray[np.int32]) -> None:
        """Give an input values, which are copied."""
        held = self._inputs.get(name)
        if held is not None and held.shape == values.shape:
            held[...] = values
            return
        self._inputs[name] = held = values.copy()
        self.of_session.bind_input(name, "cpu", 0, np.int32, held.shape, held.ctypes.data)

    def answer_in(self, logits: NDArray[np.float32]) -> None:
        """Have the logits written to an array."""
        if (at := (logits.__array_interface__["data"][0], logits.shape)) != self._logits_at:
            self.of_session.bind_output("logits", "cpu", 0, np.float32, logits.shape, at[0])
            self._logits_at = at


class _Kept:
    """Puts back what the cache holds at some places (slot, position), which are overwritten in between."""

    def __init__(self, slots: NDArray[np.float32], places: Sequence[tuple[int, int]]) -> None:
        self._slots, self._places = slots, places

    def __enter__(self) -> None:
        self._values = [self._slots[:, :, slot, :, position].copy() for slot, position in self._places]

    def __exit__(self, *error: object) -> None:
        for (slot, position), values in zip(self._places, self._values, strict=True):
            self._slots[:, :, slot, :, position] = values


def _processor_digest() -> str:
    """A name of what ONNX Runtime chooses kernels and the sizes of tiles by: the processor's features and caches."""
    facts = [*host.host_arch(), *sorted(host.cpu_flags()), *map(str, host.cache_bytes())]
    return hashlib.sha256(" ".join(facts).encode()).hexdigest()[:12]


def _load(path: Path, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=list(PROVIDERS))
    except Exception as error:
        remedy = "copy the engine again or rebuild it"
        raise EngineError(STAGE, f"model {path} cannot be loaded", found=str(error).strip(), remedy=remedy) from None
