"""INT8 engines of a BLOOM model that was trained, against Transformers in float32, over text it has not seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from belle_compile.compiler.accuracy import Comparison
from belle_compile.compiler.driver import BuildRequest, build
from belle_compile.runtime import Engine
from tests.parity.variants import Floats, hf_logits

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tiny-bloom-trained"
WINDOW, ENGLISH, CHINESE = 256, 2, 1  # windows of each language
AGREEMENT, PERPLEXITY_RATIO = 0.95, 1.01


@pytest.fixture(scope="module")
def windows() -> list[tuple[list[int], Floats]]:
    """Token ids and the reference's logits [tokens, vocab_size]."""
    tokenizer = Tokenizer.from_file(str(FIXTURE / "tokenizer.json"))
    found = []
    for name, count in (("heldout-en.txt", ENGLISH), ("heldout-zh.txt", CHINESE)):
        ids = tokenizer.encode((FIXTURE / name).read_text(encoding="utf-8")).ids
        found += [ids[start : start + WINDOW] for start in range(0, count * WINDOW, WINDOW)]
    return [(ids, hf_logits(FIXTURE, ids)) for ids in found]


def test_it_was_trained(windows: list[tuple[list[int], Floats]]) -> None:
    """Or agreement would say nothing: a tenth of the vocabulary's perplexity is far from where training ended."""
    comparison = Comparison()
    for ids, logits in windows:
        comparison.add(torch.from_numpy(logits), torch.from_numpy(logits), ids)
    assert comparison.means()["perplexity"] < logits.shape[1] / 10


@pytest.mark.parametrize("preset", ["int8", "int8-accurate"])
def test_int8_answers_as_float32_does(windows: list[tuple[list[int], Floats]], preset: str, tmp_path: Path) -> None:
    comparison = Comparison()
    directory = build(BuildRequest(FIXTURE, tmp_path / "engine", quantization=preset, isas=("avx2",)))
    with Engine.load(directory, threads=2, kv_tokens=2 * WINDOW) as engine:
        for ids, expected in windows:
            comparison.add(torch.from_numpy(expected), torch.from_numpy(np.array(engine.logits(ids))), ids)
    result = comparison.means()
    assert result["top1_agreement"] >= AGREEMENT, result
    assert result["perplexity_ratio"] <= PERPLEXITY_RATIO, result
