"""Encode requests as tokens with the prompt template and the tokenizer that the engine will have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import tokenizers

from belle_compile.compiler.accuracy import Sample
from belle_compile.compiler.checkpoint import Checkpoint
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.families import registry
from belle_compile.compiler.requests import CalibrationSet, Request, open_set
from belle_compile.runtime.artifact import PromptTemplate, SpecialTokens
from belle_compile.runtime.chat import ChatEncoder
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
        """With `raw`, texts are encoded as they are, without the prompt template. `vocabulary` bounds the token ids. `dropped`
        counts the requests that `samples` left out, and those that it cut, by reason."""
        self._raw, self._vocabulary = raw, vocabulary
        self.dropped: Counter[str] = Counter()
        self._template = ChatTemplate(prompt_template(checkpoint))
        self._words = tokenizers.Tokenizer.from_str(checkpoint.tokenizer_json)
        self._tokenizer = Tokenizer.from_text(checkpoint.tokenizer_json, special_tokens(checkpoint))

    def samples(self, requests: Iterable[Request], most: int) -> list[Sample]:
        """Encode the requests, each cut to `most` tokens (the answer first).

        Those with prompts of one token are left out, and so are those with a token that the embedding has no row for.
        """
        samples = []
        for request in requests:
            sample = self.sample(request)
            prompt = sample.prompt[:most]
            if len(prompt) < 2:
                self.dropped["left out: of one token or none"] += 1
            elif missing := self._without_row(sample):
                self.dropped[f"left out: with {missing}, which the embedding has no row for"] += 1
            else:
                samples.append(Sample(prompt, sample.answer[: most - len(prompt)]))
                self.dropped[f"cut to {most} tokens, the model's context"] += most < MOST_TOKENS and len(sample.tokens) > most
        return samples

    def _without_row(self, sample: Sample) -> str:
        """The text of the first token without a row of the embedding; empty if all have one."""
        beyond = next((token for token in sample.tokens if token >= self._vocabulary), None)
        return "" if beyond is None else self._words.id_to_token(beyond) or f"token {beyond}"

    def sample(self, request: Request) -> Sample:
        """Encode one request, uncut; raises CompileError for a token id outside the vocabulary."""
        if request.token_ids is not None:
            if request.token_ids and not 0 <= min(request.token_ids) <= max(request.token_ids) < self._vocabulary:
                found = f"token id {max(request.token_ids, key=lambda t: t if t >= self._vocabulary else -t)}"
                raise CompileError("calibration", f"line {request.line}", found=found, expected=f"0 to {self._vocabulary - 1}")
            prompt = list(request.token_ids)
        elif request.messages is not None:
            prompt = self._chat.encode(request.messages)
        else:
            text = request.text or ""
            prompt = self._chat.encode_text(text) if self._raw else self._chat.encode([{"role": "user", "content": text}])
        answer = self._answer(request.answer) if request.answer and request.token_ids is None else []
        return Sample(tuple(prompt), tuple(answer))

    @cached_property
    def _chat(self) -> ChatEncoder:
        return ChatEncoder(self._template, self._tokenizer)

    def _answer(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text)
        bos = self._tokenizer.special.bos
        return ids[1:] if self._tokenizer.special.add_bos and ids[:1] == [bos] else ids


@dataclass(frozen=True)
class Calibration:
    """The requests of a build as tokens: `calibration` guides the rounding of weights, `holdout` is what the accuracy gate
    runs. `digest` identifies the set that they come from. `notes` are sentences on requests that were left out or cut."""

    digest: str
    calibration: tuple[Sample, ...]
    holdout: tuple[Sample, ...]
    notes: tuple[str, ...] = ()


def read_calibration(path: Path, checkpoint: Checkpoint, *, raw: bool = False) -> Calibration:
    """Open a set or a file of requests and encode it for a checkpoint, see `encode_set`."""
    return encode_set(open_set(path), str(path), checkpoint, raw=raw, remedy="give more requests")


def encode_set(opened: CalibrationSet, name: str, checkpoint: Checkpoint, *, raw: bool, remedy: str) -> Calibration:
    """Encode a set of requests for a checkpoint; raises CompileError, which calls the set `name`, if no request is left to
    calibrate with or none to hold out."""
    config = registry.by_name(checkpoint.family, checkpoint.path).read_config(checkpoint.config)
    encoder = Encoder(checkpoint, config.vocab_size, raw=raw)
    most = min(MOST_TOKENS, config.max_position)
    used, held_out = (tuple(encoder.samples(requests, most)) for requests in (opened.calibration, opened.holdout))
    notes = tuple(f"{count} calibration requests were {reason}" for reason, count in sorted(encoder.dropped.items()) if count)
    if not used or not held_out:
        raise CompileError(
            "calibration",
            name,
            found="; ".join([f"{len(used)} requests to calibrate with and {len(held_out)} held out", *notes]),
            expected="at least one of each",
            remedy=remedy,
        )
    return Calibration(opened.digest, used, held_out, notes)
