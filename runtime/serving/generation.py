"""An answer from request to result: its sequence, its sampler, its text and its timings."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from belle_compile.runtime.serving.candidates import Row, Rows
from belle_compile.runtime.serving.request import Request
from belle_compile.runtime.serving.sampling import Sampler
from belle_compile.runtime.serving.scheduler import Sequence
from belle_compile.runtime.tokenizer import Detokenizer, StopStrings, Tokenizer

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Timings:
    """Wall-clock seconds of one request, including the time that steps spend on the other requests of the batch.

    `first_token_s` runs from the request's arrival to its first token, `prefill_s` from its first step to its first token,
    `decode_s` from its first token to its last. `tokens_per_second` counts the tokens after the first per second of `decode_s`;
    it is 0 for an answer of one token.
    """

    prefill_s: float
    decode_s: float
    first_token_s: float
    tokens_per_second: float


@dataclass(frozen=True)
class Result:
    """An answer. `token_ids` are all tokens generated, an end-of-sequence token included; `text` ends before that token.

    `finish_reason` is "stop" (end-of-sequence token or stop string) or "length" (max_new_tokens or the context's end). With
    prompt lookup, `drafted` tokens were guessed, of which `accepted` are in the answer.
    """

    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    timings: Timings
    drafted: int = 0
    accepted: int = 0


class Generation:
    """A request under way; a job of the step loop, which calls `accept` with the logits of each step until `done` is set.

    `on_piece` is called on the loop's thread with every piece of the text, and with None after the last. Without `on_piece`
    and without stop strings the text is not decoded piece by piece: `result` decodes it at once, on its caller's thread.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer, on_piece: Callable[[str | None], None] | None = None) -> None:
        self.request = request
        self.sequence = Sequence(request.prompt, request.max_new_tokens, request.prompt_lookup)
        self.done = threading.Event()
        self._on_piece = on_piece
        self._finish_reason: FinishReason | None = None
        self._error: BaseException | None = None
        self._sampler = Sampler(request)
        self._in_pieces = on_piece is not None or bool(request.stop)
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer)
        self._stop = StopStrings(request.stop)
        self._text: list[str] = []
        self._arrived = time.perf_counter()
        self._started = self._first = self._last = 0.0

    def start(self) -> None:
        """Start the clock of the prefill: the first step of the request is about to run."""
        self._started = time.perf_counter()

    def candidates(self) -> int:
        """Return how many of the largest logits of each row of the next step can decide its token; 0 for all."""
        return self._sampler.candidates(self.sequence.drafted)

    def accept(self, logits: Rows) -> None:
        """Choose the next tokens from `logits` [1 + drafts], which are overwritten, and end the answer where they end it.

        Row i + 1 has the logits after draft i, so it is valid only if the token chosen from row i is that draft. Rows that are
        not valid are never sampled from: tokens and random numbers are those of an answer without drafts.
        """
        for row in logits:
            if not self._accept(row) or self.done.is_set():
                return

    def _accept(self, logits: Row) -> bool:
        """Add the next token; returns whether it was drafted."""
        token = self._sampler.sample(logits)
        drafted = self.sequence.append(token)
        self._last = time.perf_counter()
        self._first = self._first or self._last
        if token in self.request.eos_ids:
            self._finish("stop")
            return drafted
        if self._in_pieces:
            self._emit(self._stop.push(self._detokenizer.push(token)))
        if self._stop.matched:
            self._end("stop")
        elif self.sequence.length == self.sequence.max_length:
            self._finish("length")
        return drafted

    def fail(self, error: BaseException) -> None:
        """End the request; `result` raises `error`."""
        self._error = error
        self._end(None)

    def result(self) -> Result:
        """Return the finished answer, or raise the error that the request ended with."""
        if self._error is not None:
            raise self._error
        assert self._finish_reason is not None, "result() of an answer that is not finished"
        tokens = self.sequence.generated
        decode_s = self._last - self._first
        rate = (len(tokens) - 1) / decode_s if len(tokens) > 1 and decode_s > 0 else 0.0
        timings = Timings(self._first - self._started, decode_s, self._first - self._arrived, rate)
        lookup = self.sequence.lookup
        counts = (lookup.drafted, lookup.accepted) if lookup else (0, 0)
        return Result(list(self.request.prompt), tokens, self._whole_text(tokens), self._finish_reason, timings, *counts)

    def _whole_text(self, tokens: list[int]) -> str:
        if self._in_pieces:
            return "".join(self._text)
        ended_by_token = tokens[-1] in self.request.eos_ids
        return self._tokenizer.decode(tokens[:-1] if ended_by_token else tokens)

    def _finish(self, reason: FinishReason) -> None:
        """Emit the text that was held back, which may still contain a stop string, and end the answer."""
        self._emit(self._stop.push(self._detokenizer.flush()))
        if self._stop.matched:
            reason = "stop"
        else:
            self._emit(self._stop.flush())
        self._end(reason)

    def _end(self, reason: FinishReason | None) -> None:
        self._finish_reason = reason
        self.done.set()
        if self._on_piece:
            self._on_piece(None)

    def _emit(self, piece: str) -> None:
        if piece:
            self._text.append(piece)
            if self._on_piece:
                self._on_piece(piece)
