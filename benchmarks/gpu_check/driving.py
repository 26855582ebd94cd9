"""Steps of an executor without tokenizer and scheduler, and their times: what a GPU host runs with numpy alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.executors.cuda import CudaExecutor
from belle_compile.runtime.program import BLOCK_SIZE, Call
from belle_compile.runtime.serving.candidates import Few, Row, Rows
from belle_compile.runtime.serving.kv_blocks import blocks_for

Floats = NDArray[np.float32]
Plan = Sequence[Mapping[int, int]]  # the steps: how many tokens each sequence is given


class TimedExecutor(CudaExecutor):
    """An executor that also times some of its calls alone, and runs kernels one after the other where it is told to."""

    def seconds_of(self, calls: Sequence[Call], rows: int, times: int = 5) -> float:
        """The least time of calls one after the other for so many rows, by the device's clock; what they write is garbage."""
        counts = {"T": min(rows, self.program.max_tokens), "R": min(rows, self.program.max_rows)}
        self._device.enter()
        self._send_counts(counts["T"], counts["R"])

        def launch() -> None:
            for call in calls:
                self._launch(call, counts[call.rows])

        recorded = self._device.record(launch)

        def run(mark: Callable[[], None]) -> None:
            for _ in range(times):
                mark()
                self._device.replay(recorded)
            mark()

        seconds = min(self._device.times(run))
        self._device.forget(recorded)
        return seconds

    def without_overlap(self) -> None:
        """From the next step on, start no kernel before those before it have ended."""
        self._device.enter()
        for recorded in self._steps.values():
            self._device.forget(recorded)
        self._steps.clear()
        launches = {name: replace(launch, overlap=False) for name, launch in self.program.launches.items()}
        self.program = replace(self.program, launches=launches)


class Sequences:
    """`count` sequences of up to `length` tokens, each with blocks of its own."""

    def __init__(self, executor: CudaExecutor, count: int, length: int) -> None:
        each, table = blocks_for(length), executor.batch.block_table
        if count > len(table) or each > table.shape[1] or count * each > executor.num_blocks:
            found = f"{executor.num_blocks * BLOCK_SIZE} tokens in all, {len(table)} sequences of {executor.batch.max_context}"
            raise EngineError("gpu check", f"a KV cache for {count} sequences of {length} tokens", found=found)
        self._executor = executor
        table[:count, :each] = np.arange(count * each).reshape(count, each)
        self.lengths = [0] * count

    def step(self, tokens: Mapping[int, Sequence[int]], *, candidates: int = 1, last: int = 1) -> Rows:
        """Logits after the last token of each sequence that is given some, or after so many of the last ones."""
        batch = self._executor.batch
        ids: list[int] = []
        positions: list[int] = []
        sequences: list[int] = []
        rows: list[int] = []
        for sequence, given in tokens.items():
            size, start = len(given), self.lengths[sequence]
            rows += range(len(ids) + max(0, size - last), len(ids) + size)
            ids += given
            positions += range(start, start + size)
            sequences += [sequence] * size
            self.lengths[sequence] += size
        batch.tokens, batch.rows = len(ids), len(rows)
        batch.token_ids[: len(ids)] = ids
        batch.positions[: len(ids)] = positions
        batch.sequences[: len(ids)] = sequences
        batch.logit_rows[: len(rows)] = rows
        assert batch.candidates is not None
        batch.candidates[: len(rows)] = candidates
        return self._executor.step(batch)

    def prefill(self, sequence: int, tokens: Sequence[int]) -> int:
        """Read a prompt in as many steps as it takes; the likeliest token after it."""
        most = self._executor.batch.max_tokens
        for start in range(0, len(tokens), most):
            logits = self.step({sequence: tokens[start : start + most]})
        return likeliest(logits[0])

    def decode(self, steps: int) -> float:
        """Median seconds of a step that gives each sequence its likeliest token."""
        tokens = {sequence: [7] for sequence in range(len(self.lengths))}
        seconds = []
        for _ in range(steps):
            started = time.perf_counter()
            tokens = {sequence: [likeliest(row)] for sequence, row in enumerate(self.step(tokens))}
            seconds.append(time.perf_counter() - started)
        return float(np.median(seconds))


def follow(executor: CudaExecutor, text: Sequence[int], plan: Plan) -> Iterable[tuple[int, int, Floats]]:
    """Sequences that all read `text`, as the plan says: (sequence, first position, logits after that and each further token it
    was given). Of a step with more tokens than rows of logits those of the last tokens of each sequence are looked at."""
    most = executor.batch.max_rows
    sequences = Sequences(executor, 1 + max(max(step) for step in plan), len(text))
    for step in plan:
        starts = {sequence: sequences.lengths[sequence] for sequence in step}
        given = {sequence: text[starts[sequence] : starts[sequence] + size] for sequence, size in step.items()}
        last = most if sum(step.values()) <= most else most // len(step)
        logits = sequences.step(given, candidates=0, last=last)
        at = 0
        for sequence, size in step.items():
            count = min(size, last)
            rows = [row for row in logits[at : at + count] if not isinstance(row, Few)]  # all are wanted whole
            yield sequence, starts[sequence] + size - count, np.stack(rows)
            at += count


def greedy(executor: CudaExecutor, ids: Sequence[int], count: int, candidates: int) -> tuple[list[int], Floats]:
    """The likeliest tokens after a prompt, by so many candidates; and the last logits, -inf where they are no candidates."""
    sequences = Sequences(executor, 1, len(ids) + count)
    logits = sequences.step({0: ids}, candidates=candidates)
    answer = [likeliest(logits[0])]
    while len(answer) < count:
        logits = sequences.step({0: answer[-1:]}, candidates=candidates)
        answer.append(likeliest(logits[0]))
    row = logits[0]
    if not isinstance(row, Few):
        return answer, row
    whole = np.full(executor.vocab_size, -np.inf, np.float32)
    whole[row.tokens] = row.values
    return answer, whole


def likeliest(row: Row) -> int:
    """The token with the largest logit."""
    return int(row.tokens[row.values.argmax()]) if isinstance(row, Few) else int(row.argmax())
