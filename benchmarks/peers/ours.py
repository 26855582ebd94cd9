"""Our engine as an adapter: greedy batches of prompts of one length."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any


class Belle:
    """Option: isa=NAME for another instruction set than the host's best."""

    def __init__(self, engine_path: str, option: str) -> None:
        from belle_compile.runtime import Engine, SamplingParams  # here, as the peers do it: loading includes the import

        settings = dict(word.split("=", 1) for word in option.split())
        isa = settings.pop("isa", None)
        if settings:
            raise ValueError(f"unknown option {option!r}; expected isa=NAME")
        self.params = SamplingParams
        self.engine = Engine.load(engine_path, threads=int(os.environ["PEERS_THREADS"]), isa=isa, prefix_cache=False)

    def gen(
        self, batch: list[list[int]], n_new: int, ignore_eos: bool, tick: Callable[[float], object] | None = None
    ) -> list[list[int]]:
        """`n_new` greedy tokens for every prompt; with `ignore_eos` false an answer ends after the end-of-text token.

        `tick` is called with the times of the first and of the last token.
        """
        params = self.params(temperature=0, repetition_penalty=1.0, max_new_tokens=n_new, ignore_eos=ignore_eos)
        results = self.engine.generate(batch, params)
        if tick:
            tick(0.0)
            tick(max(result.timings.decode_s for result in results))
        return [result.token_ids for result in results]

    def logits(self, ids: list[int], start: int) -> Any:
        """The logits at positions `start` to the last."""
        return self.engine.logits(ids)[start:]
