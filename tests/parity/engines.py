"""Engines of the variants, built once per session, and steps fed to them by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from belle_compile.compiler.driver import BuildRequest, build
from belle_compile.runtime import Engine
from belle_compile.runtime.host import host_isas
from tests import kernel_cache
from tests.parity.variants import VARIANTS

kernel_cache.install()

Floats = npt.NDArray[np.float32]
BEST_ISA = host_isas()[0]  # of the host, for tests that need one


class Builder:
    """Checkpoints and engines below a directory; what is there is not made again."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @cache  # noqa: B019  (one builder a session)
    def checkpoint(self, variant: str) -> Path:
        """The variant's checkpoint."""
        return VARIANTS[variant](self.root / variant)

    @cache  # noqa: B019
    def engine(self, variant: str, quantization: str, isas: tuple[str, ...] = (BEST_ISA,), kv_cache: str = "auto") -> Path:
        """The variant's engine with kernels for `isas`."""
        out = self.root / "-".join([variant, quantization, kv_cache, *isas])
        return build(BuildRequest(self.checkpoint(variant), out, quantization=quantization, isas=isas, kv_cache=kv_cache))


class EngineStepper:
    """Feeds tokens of several sequences to an engine's executor step by step, through scrambled cache blocks."""

    def __init__(self, engine: Engine, sequences: int = 1) -> None:
        self.executor = engine.executor
        table = self.executor.batch.block_table
        per_sequence = min(table.shape[1], 8)
        order = np.random.default_rng(11).permutation(sequences * per_sequence + 3)[: sequences * per_sequence]
        table[:sequences, :per_sequence] = order.reshape(sequences, per_sequence)
        self.done = [0] * sequences

    def step(self, tokens: Mapping[int, Sequence[int]]) -> dict[int, Floats]:
        """Logits [its tokens, vocab_size] of each sequence that is given tokens, all in one step."""
        batch, at = self.executor.batch, 0
        for sequence, given in tokens.items():
            batch.token_ids[at : at + len(given)] = given
            batch.positions[at : at + len(given)] = np.arange(self.done[sequence], self.done[sequence] + len(given))
            batch.sequences[at : at + len(given)] = sequence
            self.done[sequence] += len(given)
            at += len(given)
        batch.logit_rows[:at] = np.arange(at)
        batch.tokens = batch.rows = at
        logits = np.array(self.executor.step(batch))
        ends = np.cumsum([len(given) for given in tokens.values()])[:-1]
        return dict(zip(tokens, np.split(logits, ends), strict=True))
