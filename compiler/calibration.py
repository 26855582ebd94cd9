"""Encode requests as tokens with the prompt template and the tokenizer that the engine will have."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from belle_compile.compiler.accuracy import Sample
from belle_compile.compiler.checkpoint import Checkpoint
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.requests import Request, open_set
from belle_compile.runtime.artifact import PromptTemplate, SpecialTokens
from belle_compile.runtime.prompt import ChatTemplate
from belle_compile.runtime.tokenizer import Tokenizer

MOST_TOKENS = 512  # a request is cut off after this many tokens


def prompt_template(checkpoint: Checkpoint) -> PromptTemplate:
    """The prompt template that an engine of this checkpoint carries."""
    special = checkpoint.special
    return PromptTemplate(checkpoint.template.name, checkpoint.template.jinja, special["bos_token"], special["eos_token"])


def special_tokens(checkpoint: Checkpoint) -> SpecialTokens:
    """The special tokens that an engine of this checkpoint carries."""
    special = checkpoint.special
    return SpecialTokens(special["bos_token_id"], tuple(special["eos_token_ids"]), special["pad_token_id"], special["add_bos"])


class Encoder:
    """Encodes requests as a checkpoint's engine would."""

    def __init__(self, checkpoint: Checkpoint, vocabulary: int, *, raw: bool = False) -> None:
        """With `raw`, texts are encoded as they are, without the prompt template. `vocabulary` bounds the token ids."""
        self._raw, self._vocabulary = raw, vocabulary
        self._template = ChatTemplate(prompt_template(checkpoint))
        self._tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(checkpoint.tokenizer_json), special_tokens(checkpoint))

    def samples(self, requests: Iterable[Request], most: int) -> list[Sample]:
        """Encode the requests, each cut to `most` tokens (the answer first); those with prompts of one token are left out."""
        samples = []
        for request in requests:
            sample = self.sample(request)
            prompt = sample.prompt[:most]
            if len(prompt) > 1:
                samples.append(Sample(prompt, sample.answer[: most - len(prompt)]))
        return samples

    def sample(self, request: Request) -> Sample:
        """Encode one request, uncut; raises CompileError for a token id outside the vocabulary."""
        if request.token_ids is not None:
            if request.token_ids and not 0 <= min(request.token_ids) <= max(request.token_ids) < self._vocabulary:
                found = f"token id {max(request.token_ids, key=lambda t: t if t >= self._vocabulary else -t)}"
                raise CompileError("calibration", f"line {request.line}", found=found, expected=f"0 to {self._vocabulary - 1}")
            prompt = list(request.token_ids)
        elif request.messages is not None:
            prompt = self._tokenizer.encode(self._template.render(request.messages))
        else:
            text = request.text or ""
            prompt = self._tokenizer.encode(text if self._raw else self._template.render([{"role": "user", "content": text}]))
        answer = self._answer(request.answer) if request.answer and request.token_ids is None else []
        return Sample(tuple(prompt), tuple(answer))

    def _answer(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text)
        bos = self._tokenizer.special.bos
        return ids[1:] if self._tokenizer.special.add_bos and ids[:1] == [bos] else ids


@dataclass(frozen=True)
class Calibration:
    """The requests of a build as tokens: `calibration` guides the rounding of weights, `holdout` is what the accuracy gate
    runs. `digest` identifies the set that they come from."""

    digest: str
    calibration: tuple[Sample, ...]
    holdout: tuple[Sample, ...]


def read_calibration(path: Path, checkpoint: Checkpoint, *, raw: bool = False) -> Calibration:
    """Open a set or a file of requests and encode it for a checkpoint; raises CompileError if no request is left to calibrate
    with or none to hold out."""
    opened = open_set(path)
    encoder = Encoder(checkpoint, int(checkpoint.config["vocab_size"]), raw=raw)
    parts = [tuple(encoder.samples(requests, MOST_TOKENS)) for requests in (opened.calibration, opened.holdout)]
    if not all(parts):
        raise CompileError(
            "calibration", str(path), found=f"{len(parts[0])} requests to calibrate with and {len(parts[1])} held out",
            expected="at least one of each", remedy="give more requests",
        )  # fmt: skip
    return Calibration(opened.digest, *parts)
