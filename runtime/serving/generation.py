"""One request from prompt to result: its sequence, its sampler, its text, its clock."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from belle_compile.runtime.serving.candidates import Row, Rows
from belle_compile.runtime.serving.sampling import Sampler
from belle_compile.runtime.serving.scheduler import Sequence
from belle_compile.runtime.tokenizer import Detokenizer, StopStrings, Tokenizer

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Timings:
    """Seconds of one request on the wall clock, other requests of the batch included.

    `first_token_s` runs from the request's arrival, `prefill_s` from its first step to its first token, `decode_s` from
    there to its last; `tokens_per_second` are the tokens after the first per second of `decode_s`, 0 with one token.
    """

    prefill_s: float
    decode_s: float
    first_token_s: float
    tokens_per_second: float


@dataclass(frozen=True)
class Result:
    """An answer. `token_ids` hold all that was generated, the end-of-sequence token included; `text` ends before it.

    `finish_reason` is "stop" (end-of-sequence token or stop string) or "length" (max_new_tokens or the context's end). With
    prompt lookup `drafted` tokens were guessed, of which `accepted` are in the answer.
    """

    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    timings: Timings
    drafted: int = 0
    accepted: int = 0


class Generation:
    """A request under way; the step loop calls `accept` with the logits of each step until `done`.

    `on_piece` is called there with every piece of text, and with None after the last. Where nobody wants pieces and no stop
    string has to be found in them, there are none: the text is made at once, by who asks for the result.
    """

    def __init__(
        self,
        prompt: list[int],
        max_new_tokens: int,
        sampler: Sampler,
        stop: tuple[str, ...],
        end_ids: tuple[int, ...],
        tokenizer: Tokenizer,
        on_piece: Callable[[str | None], None] | None = None,
        prompt_lookup: int = 0,
    ) -> None:
        self.sequence = Sequence(prompt, max_new_tokens, prompt_lookup)
        self.done = threading.Event()
        self._on_piece = on_piece
        self._finish_reason: FinishReason | None = None
        self._error: BaseException | None = None
        self._prompt = prompt
        self._sampler = sampler
        self._end_ids = end_ids
        self._in_pieces = on_piece is not None or bool(stop)
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer)
        self._stop = StopStrings(stop)
        self._text: list[str] = []
        self._arrived = time.perf_counter()
        self._started = self._first = self._last = 0.0

    def start(self) -> None:
        """A step that holds the first tokens is about to run."""
        self._started = self._started or time.perf_counter()

    def candidates(self) -> int:
        """How many of the best logits of each row of the next step can decide its token; 0 for all."""
        return self._sampler.candidates(self.sequence.drafted)

    def accept(self, logits: Rows) -> None:
        """Choose the next tokens from `logits` [1 + drafts] (scratch) and see whether the answer ends with them.

        Each row is that after the draft before it, so it counts only while the tokens chosen are those drafted. A row that
        does not count is never sampled from: tokens and random numbers are those of an answer without drafts.
        """
        for row in logits:
            if not self._accept(row) or self.done.is_set():
                return

    def _accept(self, logits: Row) -> bool:
        """Take one token; returns whether it was drafted."""
        token = self._sampler.sample(logits)
        drafted = self.sequence.append(token)
        self._last = time.perf_counter()
        self._first = self._first or self._last
        if token in self._end_ids:
            self._finish("stop")
            return drafted
        if self._in_pieces:
            self._emit(self._stop.push(self._detokenizer.push(token)))
        if self._stop.found:
            self._end("stop")
        elif self.sequence.length == self.sequence.max_length:
            self._finish("length")
        return drafted

    def fail(self, error: BaseException) -> None:
        """End the request; `result` raises `error`."""
        self._error = error
        self._end(None)

    def result(self) -> Result:
        """The finished answer, or the error the request ended with."""
        if self._error is not None:
            raise self._error
        assert self._finish_reason is not None, "result() of an answer that is not finished"
        tokens = self.sequence.generated
        decode_s = self._last - self._first
        rate = (len(tokens) - 1) / decode_s if len(tokens) > 1 and decode_s > 0 else 0.0
        timings = Timings(self._first - self._started, decode_s, self._first - self._arrived, rate)
        lookup = self.sequence.lookup
        counts = (lookup.drafted, lookup.accepted) if lookup else (0, 0)
        return Result(self._prompt, tokens, self._whole_text(tokens), self._finish_reason, timings, *counts)

    def _whole_text(self, tokens: list[int]) -> str:
        if self._in_pieces:
            return "".join(self._text)
        ended = tokens[-1] in self._end_ids
        return self._tokenizer.decode(tokens[:-1] if ended else tokens)

    def _finish(self, reason: FinishReason) -> None:
        """Release the text that was held back; a stop string may still begin in it."""
        self._emit(self._stop.push(self._detokenizer.flush()))
        if self._stop.found:
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
