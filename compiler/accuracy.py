"""How far an engine's predictions are from the unquantized model's, over held-out requests."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from belle_compile.compiler.ir.stream import ActivationStream
from belle_compile.compiler.ranked_engine import RankedEngine
from belle_compile.runtime.engine import Engine
from belle_compile.runtime.serving.request import SamplingParams

Tensor = torch.Tensor

GREEDY_TOKENS = 32  # tokens of a greedy continuation, compared with what the model predicts


@dataclass(frozen=True)
class Sample:
    """A held-out request as tokens: the prompt, and the answer it should get where one is known."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...] = ()

    @property
    def tokens(self) -> tuple[int, ...]:
        """The prompt followed by the answer."""
        return self.prompt + self.answer


@dataclass(frozen=True)
class Accuracy:
    """How near an engine is to its unquantized model.

    `top1_agreement` (the share of tokens after which both predict the same next one) and `kl` (KL divergence of the engine's
    distribution from the model's, in nats) are means over all tokens. `perplexity` is the engine's on prompts and answers, and
    `perplexity_ratio` divides it by the model's. `greedy_prefix` is the mean share of a greedy continuation before the first
    token that the model would not choose. `answer_accuracy` is the share of the expected answers' tokens that the engine
    predicts, `accuracy_kept` divides it by the model's share; both are None without expected answers.
    """

    requests: int
    tokens: int
    top1_agreement: float
    kl: float
    perplexity: float
    perplexity_ratio: float
    greedy_prefix: float
    answers: int = 0
    answer_accuracy: float | None = None
    accuracy_kept: float | None = None

    def to_plain(self) -> dict[str, Any]:
        """The fields as the manifest and the report hold them, floats rounded to six decimals."""
        return {key: round(value, 6) if isinstance(value, float) else value for key, value in vars(self).items()}


@dataclass
class Comparison:
    """Running sums over sequences that both the model and the engine were run on."""

    tokens: int = 0
    agree: int = 0
    kl: float = 0.0
    predicted: int = 0
    reference_loss: float = 0.0
    loss: float = 0.0
    answer_tokens: int = 0
    reference_right: int = 0
    right: int = 0
    matched: list[float] = field(default_factory=list)

    def add(self, reference: Tensor, other: Tensor, ids: Sequence[int], answer: int = 0) -> None:
        """Add the logits [tokens, vocabulary] of the model (`reference`) and of the engine (`other`) after each of `ids`, the
        last `answer` of which are an expected answer."""
        p, q = (torch.log_softmax(logits.float(), -1) for logits in (reference, other))
        top, reference_top = other.argmax(-1), reference.argmax(-1)
        targets = torch.tensor(ids[1:], dtype=torch.int64)
        losses = [log.double().sum() for log in (each[:-1].gather(1, targets[:, None]) for each in (p, q))]
        self.tokens += len(ids)
        self.agree += int((top == reference_top).sum())
        self.predicted += len(targets)
        self.reference_loss -= float(losses[0])
        self.loss -= float(losses[1])
        self.kl += float(torch.sub(p, q, out=q).mul_(p.exp_()).sum(-1).double().sum())
        if answer:
            self.answer_tokens += answer
            self.reference_right += int((reference_top[:-1] == targets)[-answer:].sum())
            self.right += int((top[:-1] == targets)[-answer:].sum())

    def add_continuation(self, reference: Tensor, ids: Sequence[int], continued: int) -> None:
        """Add the model's logits over a prompt and the engine's greedy continuation of `continued` tokens."""
        chosen = reference[-continued - 1 : -1].argmax(-1)
        same = (chosen == torch.tensor(ids[-continued:])).tolist()
        self.matched.append((same.index(False) if False in same else continued) / continued)

    def means(self) -> dict[str, float]:
        """Means over all tokens added, and the perplexity over all tokens that have a token before them."""
        predicted = max(self.predicted, 1)
        return {
            "tokens": self.tokens,
            "top1_agreement": round(self.agree / self.tokens, 6),
            "kl": round(self.kl / self.tokens, 6),
            "perplexity": round(math.exp(self.loss / predicted), 6),
            "perplexity_ratio": round(math.exp((self.loss - self.reference_loss) / predicted), 6),
        }

    def result(self, requests: int, answers: int) -> Accuracy:
        """The accuracy over all sequences added, which come from `requests` requests with `answers` expected answers."""
        accuracy = kept = None
        if self.answer_tokens:
            accuracy = self.right / self.answer_tokens
            kept = self.right / self.reference_right if self.reference_right else 1.0
        prefix = sum(self.matched) / max(len(self.matched), 1)
        means: dict[str, Any] = self.means()
        return Accuracy(requests, **means, greedy_prefix=prefix, answers=answers, answer_accuracy=accuracy, accuracy_kept=kept)


def measure(
    engine: Engine | RankedEngine,
    model: ir.Model,
    samples: Sequence[Sample],
    folder: Path,
    *,
    greedy: int = GREEDY_TOKENS,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Accuracy:
    """Compare the engine, run as it will serve, with the unquantized float32 `model` on the samples that fit its context.

    The model is run segment by segment, so that the weights of only one segment are in memory; the activations between segments
    are files in `folder`. Prompts are also continued by `greedy` tokens where the context has room for them. `on_progress` is
    called with the number of segments done and of all segments.
    """
    max_context = engine.max_context
    samples = [sample for sample in samples if len(sample.tokens) <= max_context]
    params = SamplingParams(temperature=0, repetition_penalty=1.0, max_new_tokens=greedy, ignore_eos=True)
    continued = [sample for sample in samples if len(sample.prompt) + greedy <= max_context]
    answers = engine.generate([list(sample.prompt) for sample in continued], params) if continued else []
    tails = [(*sample.prompt, *result.token_ids) for sample, result in zip(continued, answers, strict=True)]
    # The model's logits over a prompt without an answer are the first ones over its continuation.
    whole = [sample for sample in samples if sample.answer or len(sample.prompt) + greedy > max_context]
    stream = ActivationStream(model, [*(sample.tokens for sample in whole), *tails], folder)
    comparison = Comparison()

    def compare(number: int, logits: Tensor) -> None:
        sample = whole[number] if number < len(whole) else continued[number - len(whole)]
        if number >= len(whole):
            comparison.add_continuation(logits, tails[number - len(whole)], greedy)
        if number < len(whole) or not sample.answer:
            ids = sample.tokens
            comparison.add(logits[: len(ids)], torch.from_numpy(engine.logits(ids)), ids, len(sample.answer))

    for number in range(len(stream.segments)):
        on_progress(number, len(stream.segments))
        stream.forward(number, stream.load(number), on_logits=compare)
        stream.drop(number)
    on_progress(len(stream.segments), len(stream.segments))
    return comparison.result(len(samples), sum(bool(sample.answer) for sample in samples))
