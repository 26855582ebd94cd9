"""Answers with a draft engine of the same model, quantized further, are those without it, also in batches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from belle_compile.runtime import Engine, SamplingParams
from tests.parity.engines import Builder
from tests.parity.variants import random_ids


@pytest.mark.parametrize("variant", ["llama_gqa", "bloom_3_heads"])
def test_answers_are_those_without_a_draft(builder: Builder, variant: str) -> None:
    prompts = [random_ids(builder.checkpoint(variant), n, seed=n) for n in (4, 9, 17, 40, 2)]
    greedy = SamplingParams(temperature=0.0, repetition_penalty=1.0, max_new_tokens=40, ignore_eos=True)
    params = [greedy, replace(greedy, temperature=1.0, top_k=3, seed=3, logprobs=1)]
    engine, options = builder.engine(variant, "int8"), {"threads": 2, "kv_tokens": 1024}

    def answers(**draft: Any) -> tuple[list[Any], int]:
        with Engine.load(engine, **options, **draft) as loaded:
            results = [result for way in params for result in loaded.generate(prompts, way)]
            return [(result.token_ids, result.logprobs) for result in results], loaded.stats().accepted_tokens

    expected, _ = answers()
    for tokens in (3, None):
        guessed, accepted = answers(draft=builder.engine(variant, "int4"), draft_tokens=tokens)
        assert guessed == expected and (accepted > 0 or tokens is None)
