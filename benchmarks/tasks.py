"""What is timed: prompts of random tokens through an engine, and what of the limit each run reached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from belle_compile.runtime import Engine, SamplingParams
from benchmarks.engines import Cost


@dataclass(frozen=True)
class Task:
    """`batch` prompts of `prompt` tokens, `steps` decoding steps after the first token; without steps prefill is timed."""

    name: str
    batch: int
    prompt: int
    steps: int = 0

    @property
    def context(self) -> float:
        """Mean number of cached tokens a decoding step attends to."""
        return self.prompt + (self.steps + 1) / 2

    @property
    def kv_tokens(self) -> int:
        """Tokens the cache must hold, whole blocks a sequence."""
        return self.batch * (self.prompt + self.steps + 1 + 16)

    def run(self, engine: Engine, random: np.random.Generator, steps: int | None = None) -> float:
        """Seconds of a decoding step, or of the whole prefill up to its token, that is head and sampling included."""
        steps = self.steps if steps is None else steps
        prompts = random.integers(5, 250, (self.batch, self.prompt)).tolist()
        params = SamplingParams(temperature=0, repetition_penalty=1.0, max_new_tokens=steps + 1, ignore_eos=True)
        timings = [result.timings for result in engine.generate(prompts, params)]
        if steps:
            return max(timing.decode_s for timing in timings) / steps
        return max(timing.prefill_s for timing in timings)

    def sample(self, seconds: float, cost: Cost, limit: float) -> dict[str, float]:
        """What a run of `seconds` means, with the limit in GB/s (decoding) or TOP/s (prefill) measured beside it."""
        if self.steps:
            reached = cost.decode_bytes(self.batch, self.context) / seconds / 1e9
            tokens = self.batch
        else:
            reached = cost.prefill_operations(self.prompt) / seconds / 1e12
            tokens = self.batch * self.prompt
        rate = round(tokens / seconds, 2)
        return {
            "tokens_per_second": rate,
            "seconds": round(seconds, 6),
            "limit": round(limit, 3),
            "share": round(reached / limit, 4),
        }

    def describe(self) -> dict[str, Any]:
        """For the results."""
        unit = "GB/s" if self.steps else "TOP/s"
        return {"batch": self.batch, "prompt": self.prompt, "steps": self.steps, "context": self.context, "limit_unit": unit}


TASKS = (
    Task("decode", 1, 32, 64),
    Task("decode, batch 8", 8, 32, 32),
    Task("prefill 512", 1, 512),
    Task("decode after 2000", 1, 2000, 32),
)
# For the scaling note: batches at a short context, contexts at batch 1.
SWEEP = (
    *(Task(f"batch {batch}", batch, 32, 24) for batch in (1, 2, 4, 8, 16)),
    *(Task(f"context {prompt}", 1, prompt, 24) for prompt in (500, 1000, 2000)),
    Task("prefill 512", 1, 512),
)
