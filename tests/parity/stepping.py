"""Feeding sequences to a graph step by step, through a paged cache whose blocks lie in disorder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from compiler.ir.evaluate import PagedCache, evaluate

Floats = npt.NDArray[np.float32]

BLOCK_SIZE = 16


class Stepper:
    """Sequences 0..n-1 of up to `length` tokens each; remembers how far each one is."""

    def __init__(self, model: ir.Model, sequences: int = 1, length: int = 64) -> None:
        self.model = model
        facts = model.metadata_props
        per_sequence = -(-length // BLOCK_SIZE)
        blocks = sequences * per_sequence + 3  # more than needed, so some stay unused
        layers, kv_heads, head_dim = (int(facts[key]) for key in ("num_layers", "num_kv_heads", "head_dim"))
        self.cache = PagedCache(layers, kv_heads, head_dim, blocks)
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
        logits = evaluate(self.model, inputs, self.cache)["logits"]
        for sequence, given in tokens.items():
            self.done[sequence] += len(given)
        ends = np.cumsum([len(given) for given in tokens.values()])[:-1]
        return dict(zip(tokens, np.split(logits, ends), strict=True))


def relative_error(found: Floats, expected: Floats) -> float:
    """Largest difference over the largest magnitude expected."""
    assert found.shape == expected.shape, f"{found.shape} != {expected.shape}"
    return float(np.abs(found - expected).max() / np.abs(expected).max())
