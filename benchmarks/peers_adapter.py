"""This engine as an adapter of the peer kit: greedy batches of prompts of one length, timed by the kit."""

from __future__ import annotations

import os
from typing import Any

from runtime import Engine, SamplingParams


class Belle:
    """`option` is the instruction set, empty for the host's best."""

    def __init__(self, engine_path: str, option: str) -> None:
        self.engine = Engine.load(engine_path, threads=int(os.environ["PEERS_THREADS"]), isa=option or None)

    def gen(self, batch: list[list[int]], n_new: int, ignore_eos: bool) -> list[list[int]]:
        """`n_new` greedy tokens for every prompt; with `ignore_eos` false an answer ends after the end-of-text token."""
        params = SamplingParams(temperature=0, repetition_penalty=1.0, max_new_tokens=n_new, ignore_eos=ignore_eos)
        return [result.token_ids for result in self.engine.generate(batch, params)]

    def logits(self, ids: list[int], start: int) -> Any:
        """The logits at positions `start` to the last."""
        return self.engine.logits(ids)[start:]
