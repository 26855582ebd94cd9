"""Accuracy of an engine against the unquantized model, and the gate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from belle_compile.compiler.accuracy import Accuracy, Comparison, Sample, measure
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.gate import Gate
from belle_compile.compiler.ir.stream import ActivationStream
from belle_compile.compiler.judging import accuracy_of
from belle_compile.runtime.serving.request import SamplingParams
from tests.passes.helpers import VOCABULARY, llama

GOOD = Accuracy(10, 1000, 0.99, 0.001, 12.0, 1.001, 0.9, 5, 0.5, 1.0)


def logits_of(*probabilities: Sequence[float]) -> torch.Tensor:
    return torch.log(torch.tensor(probabilities))


def test_means_by_hand() -> None:
    reference = logits_of((0.5, 0.25, 0.25), (0.2, 0.7, 0.1), (0.1, 0.1, 0.8))
    other = logits_of((0.25, 0.5, 0.25), (0.2, 0.7, 0.1), (0.1, 0.1, 0.8))
    comparison = Comparison()
    comparison.add(reference, other, [2, 1, 1], answer=1)
    found = comparison.result(1, 1)
    assert (found.requests, found.tokens, found.answers) == (1, 3, 1)
    assert found.top1_agreement == pytest.approx(2 / 3)
    assert found.kl == pytest.approx((0.5 * math.log(2) - 0.25 * math.log(2)) / 3, rel=1e-5)
    # Token 1 is predicted with 0.25 and 0.5 at first, token 1 again with 0.7 by both.
    assert found.perplexity == pytest.approx(math.exp(-(math.log(0.5) + math.log(0.7)) / 2), rel=1e-5)
    assert found.perplexity_ratio == pytest.approx(math.exp(-(math.log(0.5) - math.log(0.25)) / 2), rel=1e-5)
    assert (found.answer_accuracy, found.accuracy_kept) == (1.0, 1.0)


def test_accuracy_kept_is_a_share_of_the_models_own() -> None:
    right, wrong = (0.1, 0.8, 0.1), (0.8, 0.1, 0.1)
    reference, other = logits_of(right, right, right, wrong, right), logits_of(right, right, wrong, wrong, right)
    comparison = Comparison()
    comparison.add(reference, other, [1, 1, 1, 1, 1], answer=4)
    found = comparison.result(1, 1)
    assert found.answer_accuracy == 0.5 and found.accuracy_kept == pytest.approx(2 / 3)


def test_a_continuation_counts_up_to_the_first_other_token() -> None:
    comparison = Comparison()
    reference = logits_of((0.1, 0.9), (0.9, 0.1), (0.1, 0.9), (0.9, 0.1), (0.5, 0.5))
    comparison.add_continuation(reference, [0, 1, 0, 0, 0], 4)  # the model says 1, 0, 1, 0 after the prompt's only token
    assert comparison.matched == [0.5]
    comparison.add_continuation(reference, [0, 1, 0, 1, 0], 4)
    assert comparison.matched == [0.5, 1.0]


def test_without_answers_nothing_is_kept() -> None:
    comparison = Comparison()
    comparison.add(logits_of((0.5, 0.5), (0.5, 0.5)), logits_of((0.5, 0.5), (0.5, 0.5)), [0, 1])
    assert comparison.result(1, 0).accuracy_kept is None


@dataclass
class FakeResult:
    token_ids: tuple[int, ...]


class FakeEngine:
    """The model itself, its logits changed by `noise`."""

    max_context = 64

    def __init__(self, model: ir.Model, folder: Path, noise: float) -> None:
        self._model, self._folder, self._noise = model, folder, noise
        self.scored: list[tuple[int, ...]] = []

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        self.scored.append(tuple(ids))
        return self._run(ids)

    def _run(self, ids: Sequence[int]) -> np.ndarray:
        found: list[torch.Tensor] = []
        stream = ActivationStream(self._model, [list(ids)], self._folder)
        for number in range(len(stream.segments)):
            stream.forward(number, stream.load(number), on_logits=lambda _, logits: found.append(logits))
        spread = np.random.default_rng(len(ids)).standard_normal((len(ids), VOCABULARY))
        return found[0].numpy() + self._noise * spread.astype(np.float32)

    def generate(self, prompts: Sequence[list[int]], params: SamplingParams) -> list[FakeResult]:
        assert params.temperature == 0 and params.ignore_eos and params.max_new_tokens is not None
        results = []
        for prompt in prompts:
            ids = list(prompt)
            for _ in range(params.max_new_tokens):
                ids.append(int(self._run(ids)[-1].argmax()))
            results.append(FakeResult(tuple(ids[len(prompt) :])))
        return results


SAMPLES = [Sample((3, 1, 4, 1, 5), (9, 2)), Sample((2, 7, 1, 8)), Sample(tuple(range(40)) + tuple(range(40)))]


def measured(tmp_path: Path, noise: float) -> tuple[Accuracy, FakeEngine]:
    model = llama(last_norm=True)
    engine: Any = FakeEngine(model, tmp_path / "fake", noise)
    return measure(engine, model, SAMPLES, tmp_path / "model", greedy=4), engine


def test_the_model_against_itself(tmp_path: Path) -> None:
    found, engine = measured(tmp_path, 0.0)
    assert (found.top1_agreement, found.greedy_prefix, found.accuracy_kept) == (1.0, 1.0, 1.0)
    assert found.kl == pytest.approx(0, abs=1e-9) and found.perplexity_ratio == pytest.approx(1, abs=1e-6)
    # The third sample does not fit into the engine's context.
    assert sorted(engine.scored) == sorted(sample.tokens for sample in SAMPLES[:2])
    assert (found.requests, found.answers, found.tokens) == (2, 1, 11)


def test_noise_is_found(tmp_path: Path) -> None:
    found, _ = measured(tmp_path, 3.0)
    assert found.top1_agreement < 0.6 and found.kl > 0.5 and found.perplexity_ratio != pytest.approx(1, abs=0.01)
    assert found.greedy_prefix < 1


def test_a_good_engine_passes() -> None:
    assert Gate().misses(GOOD) == [] and Gate().misses(replace(GOOD, accuracy_kept=None)) == []


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"perplexity_ratio": 1.02}, "perplexity ratio 1.0200"),
        ({"perplexity_ratio": math.nan}, "perplexity ratio nan"),
        ({"top1_agreement": 0.94}, "top-1 agreement 0.9400"),
        ({"accuracy_kept": 0.97}, "share of accuracy kept 0.9700"),
        ({"accuracy_kept": 0.0}, "share of accuracy kept 0.0000"),
    ],
)
def test_each_limit_is_applied(changes: dict[str, float], found: str) -> None:
    misses = Gate().misses(replace(GOOD, **changes))
    assert [text for text, _ in misses] == [found]


def test_limits_are_the_users() -> None:
    assert Gate(max_perplexity_ratio=1.0005).misses(GOOD) == [("perplexity ratio 1.0010", "at most 1.0005")]
    assert Gate(min_top1=0.995, min_accuracy_kept=1.1).misses(GOOD) != []


def test_an_engine_that_cannot_be_tried(tmp_path: Path) -> None:
    with pytest.raises(
        CompileError, match=r"the engine cannot run on this host: found .*; build where it can, or with --no-gate"
    ):
        accuracy_of(tmp_path, 1, llama(), SAMPLES, tmp_path)


def test_the_error_of_a_missed_limit_names_the_ways_out() -> None:
    misses = [("top-1 agreement 0.9000", "at least 0.95")]
    few = str(Gate().missed(replace(GOOD, requests=8), misses, ["h.0.up", "h.1.up"], 1.0, "calibration is kept"))
    assert "over 8 held-out requests, which are few: found top-1 agreement 0.9000, expected at least 0.95; " in few
    assert "look at h.0.up, h.1.up; keep the layers that INT8 hurts most float32 with --size-budget 1.2, build with" in few
    assert few.endswith("give more requests to calibrate with and to hold out, or set other limits with --max-ppl-ratio, "
                        "--min-top1 or --min-accuracy-kept; calibration is kept.")  # fmt: skip
    many = str(Gate().missed(replace(GOOD, requests=200), misses, [], 1.5, "calibration is kept"))
    assert "few" not in many and "look at" not in many and "--size-budget above 1.5" in many
