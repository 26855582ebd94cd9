"""What the prefix cache saves: requests that share one system prompt, computed cold and from the cache.

    python -m benchmarks.prefix_cache ENGINE [--out benchmarks/results/prefix-cache.json]

First, 32 requests with one system prompt of 1,500 tokens arrive at once: the prompt tokens computed must be the distinct ones.
Then single requests, in turns: a system prompt that was never seen (a miss), and the same one with another question (a hit).
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from belle_compile.runtime import Engine, SamplingParams
from benchmarks import machine

SYSTEM, QUESTION, REQUESTS, ROUNDS = 1500, 20, 32, 9
PARAMS = SamplingParams(temperature=0, repetition_penalty=1.0, max_new_tokens=8, ignore_eos=True)


def distinct_tokens(prompts: list[list[int]]) -> int:
    """Return the number of tokens that follow different beginnings: what must be computed if nothing is computed twice.

    The last token of each prompt counts by itself, for its logits are needed.
    """
    prefixes = {tuple(prompt[:length]) for prompt in prompts for length in range(1, len(prompt))}
    return len(prefixes) + len(prompts)


def measure(engine: Engine) -> dict[str, Any]:
    """Return the counts of the shared prompt, and seconds to the first token of misses and hits."""
    chance = np.random.default_rng(0)

    def tokens(count: int) -> list[int]:
        return chance.integers(5, min(250, engine.executor.vocab_size), count).tolist()  # type: ignore[no-any-return]

    system = tokens(SYSTEM)
    prompts = [system + tokens(QUESTION) for _ in range(REQUESTS)]
    before = engine.stats()
    engine.generate(prompts, PARAMS)
    computed = engine.stats().prompt_tokens - before.prompt_tokens
    misses: list[float] = []
    hits: list[float] = []
    for _ in range(ROUNDS):
        system = tokens(SYSTEM)
        for times in (misses, hits):
            (result,) = engine.generate([system + tokens(QUESTION)], PARAMS)
            times.append(result.timings.first_token_s)
    return {
        "prompt_tokens": sum(map(len, prompts)),
        "computed": computed,
        "distinct": distinct_tokens(prompts),
        "miss_first_token_ms": round(1000 * statistics.median(misses), 2),
        "hit_first_token_ms": round(1000 * statistics.median(hits), 2),
        "ratio": round(statistics.median(hit / miss for hit, miss in zip(hits, misses, strict=True)), 4),
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with Engine.load(options.engine) as engine:
        row = measure(engine)
    print(json.dumps(row))
    if options.out:
        facts = {"system_tokens": SYSTEM, "requests": REQUESTS, "rounds": ROUNDS, "engine": options.engine.name}
        options.out.write_text(json.dumps({"machine": machine.describe(), **facts, **row}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
