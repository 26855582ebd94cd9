"""Engines of ONNX Runtime on the GPU: their answers, whether these depend on what else is in a step, and their times.

python -m benchmarks.gpu_check.checks BUNDLE onnxruntime/NAME FINDINGS
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from belle_compile.runtime.executors.base import Executor
from belle_compile.runtime.executors.batch import StepBatch
from belle_compile.runtime.executors.kv_memory import KvMemory
from belle_compile.runtime.program import BLOCK_SIZE
from belle_compile.runtime.serving.kv_blocks import blocks_for
from benchmarks.gpu_check.findings import Findings

FOLDER = "onnxruntime"  # of a bundle
PACKAGE = "onnxruntime-gpu"
# As shares of the largest logit, the largest error of a row, and the median. Attention, and without quantization every product,
# is in float16.
TOLERANCE = {"none": (1e-2, 3e-3), "int8": (0.1, 0.03)}
STEPS, PROMPT, PIECE = 32, 512, 128  # of the times: answers, tokens of a prompt, and of them in a step

Floats = NDArray[np.float32]
Step = Mapping[int, int]  # how many tokens each sequence is given


class Reader:
    """Sequences over an executor that all read `text`, whose first `prompt` tokens are the prompt; blocks are their own."""

    def __init__(self, executor: Executor, text: Sequence[int], prompt: int, count: int) -> None:
        self._executor, self._text, self._done = executor, text, [0] * count
        blocks = blocks_for(len(text))
        executor.batch.block_table[:count, :blocks] = np.arange(count * blocks).reshape(count, blocks)
        executor.batch.prompt_lengths[:count] = prompt

    def step(self, counts: Step) -> dict[tuple[int, int], Floats]:
        """Logits after the last tokens of each sequence, as many as there are rows for, by sequence and position."""
        batch = self._executor.batch
        rows, at = batch.max_rows // len(counts), 0
        places: list[tuple[int, int]] = []
        for sequence, count in counts.items():
            start = self._done[sequence]
            batch.token_ids[at : at + count] = self._text[start : start + count]
            batch.positions[at : at + count] = np.arange(start, start + count)
            batch.sequences[at : at + count] = sequence
            first = max(0, count - rows)
            for offset in range(first, count):
                batch.logit_rows[len(places)] = at + offset
                places.append((sequence, start + offset))
            self._done[sequence] += count
            at += count
        batch.tokens, batch.rows = at, len(places)
        return {place: np.array(row) for place, row in zip(places, self._executor.step(batch), strict=True)}

    def read(self, steps: Sequence[Step]) -> dict[tuple[int, int], Floats]:
        """The logits of all steps."""
        found: dict[tuple[int, int], Floats] = {}
        for step in steps:
            found |= self.step(step)
        return found


def plans(prompt: int, length: int, batch: StepBatch) -> dict[str, list[Step]]:
    """Ways to read a prompt and an answer, of `length` tokens together, in steps that fit `batch`; the first one has the logits
    of every token."""
    answer, every, rows = length - prompt, range(batch.max_sequences), batch.max_rows
    long = min(batch.max_tokens, 2 * prompt // 3)
    thin, thick = ([{0: min(size, prompt - start)} for start in range(0, prompt, size)] for size in (rows, long))
    pieces = [{sequence: min(8, prompt - start) for sequence in every} for start in range(0, prompt, 8)]
    return {
        "alone": [*thin, *[{0: 1}] * answer],
        "in long pieces": [*thick, *[{0: 1}] * answer],
        "together": [*pieces, *[dict.fromkeys(every, 1)] * answer],
        "one after the other": [
            *thick,
            *({0: 1, 1: min(8, prompt - start)} for start in range(0, min(prompt, 8 * answer), 8)),
        ],
    }


def check_small(folder: Path, findings: Findings, prompt: int, limit: Mapping[str, tuple[float, float]] = TOLERANCE) -> None:
    """Logits of an engine beside those expected, and whether each way to compute them gives the same bits."""
    if (executor := _loaded(folder, findings, 8 * 336)) is None:
        return
    with np.load(folder / "expected.npz") as expected:
        ids, tokens, wanted = expected["ids"].tolist(), expected["tokens"].tolist(), expected["logits"]
    tolerance = limit[folder.name.rpartition("-")[2]]
    findings.note(tolerance=list(tolerance), right=False, kernels=executor.kernels)
    text = ids + tokens[:-1]
    with closing(executor):
        batch = executor.batch
        ways = plans(prompt, len(text), batch)
        found = {name: Reader(executor, text, prompt, batch.max_sequences).read(steps) for name, steps in ways.items()}
    alone = {position: row for (_, position), row in found["alone"].items()}
    different = {
        name: sum(not np.array_equal(row, alone[position]) for (_, position), row in rows.items())
        for name, rows in found.items()
    }
    logits = np.stack([alone[position] for position in range(len(text))])
    errors = np.abs(logits - wanted).max(axis=1) / np.abs(wanted).max()
    errors[~np.isfinite(errors)] = np.finfo(np.float32).max
    same = int((logits[prompt - 1 :].argmax(axis=1) == tokens).sum())
    largest, median = float(errors.max()), float(np.median(errors))
    findings.note(largest_error=largest, median_error=median, same_tokens=same, of=len(tokens), rows_with_other_bits=different)
    findings.note(right=bool(largest < tolerance[0] and median < tolerance[1] and not any(different.values())))


def check_large(folder: Path, findings: Findings) -> None:
    """Times of a model, whose weights are made up, for one answer and for as many as there can be."""
    if (executor := _loaded(folder, findings, 8 * blocks_for(PROMPT + STEPS) * BLOCK_SIZE)) is None:
        return
    findings.note(kernels=executor.kernels)
    text = np.random.default_rng(0).integers(5, 250, PROMPT + STEPS).tolist()
    with closing(executor):
        for count in (1, executor.batch.max_sequences):
            reader = Reader(executor, text, PROMPT, count)
            started = time.perf_counter()
            for sequence in range(count):
                reader.read([{sequence: PIECE}] * (PROMPT // PIECE))
            prompts = time.perf_counter() - started
            seconds = float(np.median([_seconds(reader, dict.fromkeys(range(count), 1)) for _ in range(STEPS)]))
            entry = {"seconds": seconds, "tokens_per_second": count / seconds, f"seconds of {count} x {PROMPT} tokens": prompts}
            findings.note_under(f"decode, batch {count}", entry)


def _seconds(reader: Reader, step: Step) -> float:
    started = time.perf_counter()
    reader.step(step)
    return time.perf_counter() - started


def _loaded(folder: Path, findings: Findings, tokens: int) -> Any:
    """The executor of an engine; None, with a finding, where the package is not installed."""
    try:
        findings.note(version=version(PACKAGE))
    except PackageNotFoundError:
        findings.note(unmeasured=f"{PACKAGE} is not installed")
        return None
    from belle_compile.runtime.executors.onnxruntime_cuda import OnnxRuntimeCudaExecutor

    started = time.perf_counter()
    executor = OnnxRuntimeCudaExecutor(folder / "rank0", KvMemory(tokens=tokens))
    findings.note(load_s=time.perf_counter() - started)
    return executor
