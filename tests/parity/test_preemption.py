"""A real engine with little room: prefixes from the cache, preemptions, and lengths beyond which dynamic RoPE grows."""

from __future__ import annotations

from typing import Any

import pytest

from belle_compile.runtime import Engine, SamplingParams
from tests.parity.engines import Builder
from tests.parity.variants import random_ids


@pytest.mark.parametrize(("variant", "quantization"), [("bloom", "int8-plain"), ("llama_dynamic_rope", "none")])
def test_answers_do_not_depend_on_preemptions_and_prefixes(builder: Builder, variant: str, quantization: str) -> None:
    directory, shared = builder.engine(variant, quantization), random_ids(builder.checkpoint(variant), 24, seed=1)
    prompts = [[*shared[:n], *random_ids(builder.checkpoint(variant), 4, seed=n)] for n in (24, 24, 11, 3, 20)]
    params = [
        SamplingParams(temperature=t, top_k=5, repetition_penalty=1.1, seed=3, max_new_tokens=60, ignore_eos=True, logprobs=1)
        for t in (0.0, 1.0, 0.0, 1.0, 1.0)
    ]

    def answers(results: list[Any]) -> list[Any]:
        return [(result.token_ids, result.logprobs) for result in results]

    with Engine.load(directory, threads=2, kv_tokens=4096, prefix_cache=False) as engine:
        alone = [engine.generate([prompt], one)[0] for prompt, one in zip(prompts, params, strict=True)]
    with Engine.load(directory, threads=2, kv_tokens=160) as engine:
        together = engine.generate(prompts, params)
        again = engine.generate(prompts, params)
        stats = engine.stats()
    assert answers(together) == answers(again) == answers(alone)
    assert stats.preemptions > 0 and stats.prefix_hits > 0
