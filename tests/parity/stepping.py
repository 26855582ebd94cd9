"""Feeding sequences to a graph step by step, through a paged cache whose blocks lie in disorder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from belle_compile.compiler.ir.evaluate import PagedCache, evaluate, evaluate_ranks

Floats = npt.NDArray[np.float32]

BLOCK_SIZE = 16


class Stepper:
    """Sequences 0..n-1 of up to `length` tokens each; remembers how far each one is."""

    def __init__(self, model: ir.Model, sequences: int = 1, length: int = 64) -> None:
        self.model = model
        per_sequence = -(-length // BLOCK_SIZE)
        blocks = sequences * per_sequence + 3  # more than needed, so some stay unused
        self.cache = cache_of(model, blocks)
        order = np.random.default_rng(7).permutation(blocks)[: sequences * per_sequence]
        self.block_table = order.reshape(sequences, per_sequence).astype(np.int32)
        self.done = [0] * sequences

    def step(self, tokens: Mapping[int, Sequence[int]]) -> dict[int, Floats]:
        """Logits [its tokens, vocab_size] of each sequence that is given tokens, all in one step and in the order given."""
        rows = [(sequence, token) for sequence, given in tokens.items() for token in given]
        positions = [self.done[sequence] + index for sequence, given in tokens.items() for index in range(len(given))]
        inputs = {
            "token_ids": np.asarray([token for _, token in rows], np.int32),
            "positions": np.asarray(positions, np.int32),
            "sequences": np.asarray([sequence for sequence, _ in rows], np.int32),
            "block_table": self.block_table,
            "logit_rows": np.arange(len(rows), dtype=np.int32),
        }
        logits = self.logits(inputs)
        for sequence, given in tokens.items():
            self.done[sequence] += len(given)
        ends = np.cumsum([len(given) for given in tokens.values()])[:-1]
        return dict(zip(tokens, np.split(logits, ends), strict=True))

    def logits(self, inputs: Mapping[str, npt.NDArray[np.int32]]) -> Floats:
        """Of one step, for all its tokens."""
        return evaluate(self.model, inputs, self.cache)["logits"]


class RankStepper(Stepper):
    """The same for the graphs of all ranks, whose logits make up the vocabulary."""

    def __init__(self, models: Sequence[ir.Model], sequences: int = 1, length: int = 64) -> None:
        super().__init__(models[0], sequences, length)
        self.models = models
        self.caches = [cache_of(model, self.cache.k.shape[1]) for model in models]

    def logits(self, inputs: Mapping[str, npt.NDArray[np.int32]]) -> Floats:
        """Of one step, for all its tokens, those of one rank beside those of the next."""
        parts = [outputs["logits"] for outputs in evaluate_ranks(self.models, inputs, self.caches)]
        ends = np.cumsum([0, *(part.shape[1] for part in parts)])
        assert [int(model.metadata_props["first_token"]) for model in self.models] == ends[:-1].tolist()
        return np.concatenate(parts, axis=1)


def cache_of(model: ir.Model, blocks: int) -> PagedCache:
    """A cache for the heads of a graph."""
    facts = model.metadata_props
    layers, kv_heads, head_dim = (int(facts[key]) for key in ("num_layers", "num_kv_heads", "head_dim"))
    return PagedCache(layers, kv_heads, head_dim, blocks)


def relative_error(found: Floats, expected: Floats) -> float:
    """Largest difference over the largest magnitude expected."""
    assert found.shape == expected.shape, f"{found.shape} != {expected.shape}"
    return float(np.abs(found - expected).max() / np.abs(expected).max())
