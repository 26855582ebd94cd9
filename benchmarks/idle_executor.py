"""An executor that computes nothing, to measure the rest of a step: it sleeps, then returns prepared logits."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from belle_compile.runtime.executors import EXECUTORS, Executor, ExecutorFactory, LoadRequest, StepBatch
from belle_compile.runtime.tokenizer import Tokenizer

TEXT = (
    "The kernels of a step run on all cores; what comes between two steps runs on one. 一步的计算占用所有的核，两步之间的工作只"
    "占用一个。A server that streams writes a few hundred bytes for each token, and a client reads them at once.\n"
)


class IdleExecutor:
    """Takes the place of an engine's executor. The answers of all rows are `tokens`, one after the other, again and again."""

    def __init__(self, replaced: Executor, tokens: Sequence[int], step_s: float) -> None:
        self.batch, self.vocab_size, self.num_blocks = replaced.batch, replaced.vocab_size, replaced.num_blocks
        self.kv_block_bytes, self.kernels = replaced.kv_block_bytes, replaced.kernels
        self._replaced, self._step_s = replaced, step_s
        self._tokens = np.array(tokens)
        self._logits = np.zeros((self.batch.max_rows, self.vocab_size), np.float32)
        self._rows = np.arange(self.batch.max_rows)
        self._best = np.zeros(self.batch.max_rows, np.int64)  # the token of each row that is not 0

    def step(self, batch: StepBatch) -> NDArray[np.float32]:
        """Wait as long as kernels would take, without the lock of the interpreter."""
        time.sleep(self._step_s)
        rows = self._rows[: batch.rows]
        self._logits[rows, self._best[: batch.rows]] = 0
        best = self._tokens[batch.positions[batch.logit_rows[: batch.rows]] % len(self._tokens)]
        self._logits[rows, best] = 1
        self._best[: batch.rows] = best
        return self._logits[: batch.rows]

    def close(self) -> None:
        """Free what the replaced executor holds."""
        self._replaced.close()


class _IdleFactory(ExecutorFactory):
    """Loads the executor of another factory, and replaces it."""

    def __init__(self, replaced: ExecutorFactory, step_s: float) -> None:
        self._replaced, self._step_s = replaced, step_s
        self.isas = replaced.isas

    def load(self, request: LoadRequest) -> Executor:
        tokenizer = Tokenizer.from_file(request.directory.parent / "tokenizer.json", request.manifest.special_tokens)
        executor: Executor = IdleExecutor(self._replaced.load(request), tokenizer.encode(TEXT, add_bos=False), self._step_s)
        return executor


def replace_executors(step_s: float) -> None:
    """Let the engines that this process loads compute nothing, in `step_s` seconds a step."""
    for backend, factory in EXECUTORS.items():
        EXECUTORS[backend] = _IdleFactory(factory, step_s)
