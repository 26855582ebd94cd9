"""An answer from request to result: its sequence, its sampler, its text and its timings."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.serving.candidates import Row, Rows
from belle_compile.runtime.serving.logprobs import TokenLogprob, token_logprob
from belle_compile.runtime.serving.request import Request
from belle_compile.runtime.serving.sampling import Sampler
from belle_compile.runtime.serving.scheduling import DeadlineExceeded, QueueFull, Scheduling, Withdrawn
from belle_compile.runtime.serving.sequence import Sequence
from belle_compile.runtime.serving.telemetry import End, RequestRecord
from belle_compile.runtime.tokenizer import Detokenizer, StopStrings, Tokenizer

FinishReason = Literal["stop", "length"]

_END_OF: dict[type, End] = {Withdrawn: "cancelled", DeadlineExceeded: "deadline"}


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
    """An answer. `token_ids` are all tokens generated, an end-of-sequence or stop token included; `text` ends before that one.

    `finish_reason` is "stop" (end-of-sequence token, stop token, stop string or the end of what a grammar allows) or "length"
    (max_new_tokens or the context's end). With prompt lookup or a draft model, `drafted` tokens were guessed, of which
    `accepted` are in the answer.

    `logprobs` has an entry for each of `token_ids`, and `prompt_logprobs` one for each of `prompt_token_ids`: None for the
    first, which follows nothing. Both are None unless they were asked for.

    A `cached` answer was not computed for this request: it comes from the result cache, or from an identical request that was
    under way. `cached_tokens` tokens of the prompt of a computed one came from the prefix cache.
    """

    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    timings: Timings
    drafted: int = 0
    accepted: int = 0
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    cached: bool = field(default=False, compare=False)
    cached_tokens: int = field(default=0, compare=False)


class Delta(NamedTuple):
    """A piece of an answer: text, and the tokens that came since the piece before.

    The texts joined are the answer's text, the tokens joined its tokens. The first characters of a text may belong to tokens of
    an earlier piece, where a character was not complete or a stop string could begin. The last piece may have no text, but the
    token that ends the answer. `logprobs` has an entry for each token, or is None unless log probabilities were asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None


Piece = tuple[str, int]  # what a `Delta` is made of: text, and the number of tokens that prompt and answer have with it


class Observer(Protocol):
    """Receives the tokens of a generation. Its methods are called on the thread that adds them."""

    def on_token(self, token: int, logprob: TokenLogprob | None) -> None:
        """A token was added. It may be the last one. `logprob` is None unless it was asked for."""
        ...

    def on_end(self, finish_reason: FinishReason | None, error: BaseException | None) -> None:
        """The answer ended: `finish_reason` is None if it failed with `error`."""
        ...


class Generation:
    """A request under way; a job of the step loop, which calls `accept` with the logits of each step until `done` is set.

    `on_piece` is called on the loop's thread with every piece of the answer, and `on_end` once after the last, when `done` is
    set. Without `on_piece` and without stop strings the text is not decoded piece by piece: `result` decodes it at once, on its
    caller's thread. `delta` adds to a piece what else belongs to it.
    """

    def __init__(
        self,
        request: Request,
        tokenizer: Tokenizer,
        on_piece: Callable[[Piece], None] | None = None,
        on_end: Callable[[], None] | None = None,
    ) -> None:
        self.request = request
        logits_from = None if request.prompt_logprobs is None else 0
        self.sequence = Sequence(
            request.prompt, request.max_new_tokens, request.prompt_lookup, logits_from=logits_from, salt=request.cache_salt,
            adapter=request.adapter,
        )  # fmt: skip
        self.done = threading.Event()
        self.observer: Observer | None = None
        self.cached = False
        self._reports: list[Callable[[RequestRecord], None]] = []  # one until the end is reported
        self._on_piece = on_piece
        self._on_end = on_end
        self._end_ids = frozenset(request.end_ids)
        self._logprobs: list[TokenLogprob] | None = None if request.logprobs is None else []
        self._prompt_logprobs: list[TokenLogprob | None] | None = None if request.prompt_logprobs is None else [None]
        self._unscored = 0 if request.prompt_logprobs is None else len(request.prompt) - 1  # tokens of the prompt
        self._emitted = len(request.prompt)  # tokens of the prompt and of the pieces so far
        self._finish_reason: FinishReason | None = None
        self._error: BaseException | None = None
        self._sampler = Sampler(request)
        self.sequence.sampler_ahead = self._sampler.ahead
        grammar = request.grammar
        self._constraint = tokenizer.grammars.constraint(grammar, request.end_ids, request.min_tokens) if grammar else None
        self._kept: list[Row] = []  # that wait for the grammar
        self._in_pieces = on_piece is not None or bool(request.stop)
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer)
        self._stop = StopStrings(request.stop, tokenizer.special_names if request.stop else None)
        self._text: list[str] = []
        self._arrived = time.monotonic()
        self._started = self._first = self._last = 0.0

    def accompany(self, scheduling: Scheduling, report: Callable[[RequestRecord], None]) -> None:
        """Take how the request is scheduled, and what takes its record when it ends; before it is submitted."""
        self.sequence.scheduling = scheduling
        self.sequence.deadline = scheduling.deadline(self._arrived)
        self._reports = [report]

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that came from the prefix cache."""
        return self.sequence.cached_tokens

    def start(self) -> None:
        """Start the clock of the prefill: the first step of the request is about to run."""
        self._started = time.monotonic()
        if self._constraint and not self.cached:
            self._constraint.begin()

    def candidates(self) -> int:
        """Return how many of the largest logits of each row of the next step can decide its token; 0 for all."""
        return 0 if self._unscored else self._sampler.candidates(self.sequence.drafted)

    def accept(self, logits: Rows) -> Future[Any] | None:
        """Choose the next tokens from `logits` [1 + drafts], which are overwritten, and end the answer where they end it.

        Where it is not known yet what the answer's grammar allows, the rows from there on are copied, and what they wait for is
        returned.

        Row i + 1 has the logits after draft i, so it is valid only if the token chosen from row i is that draft. Rows that are
        not valid are never sampled from: tokens and random numbers are those of an answer without drafts. Before these rows
        come those after the prompt's tokens except its last, if its log probabilities were asked for.
        """
        awaited, rest = self._take(logits)
        self._kept = [np.array(row) for row in rest]  # whole rows, for a grammar needs all logits
        return awaited

    def resume(self) -> Future[Any] | None:
        """Choose the next tokens from the rows that `accept` has kept. Without any, nothing happens."""
        awaited, self._kept = self._take(self._kept)
        return awaited

    def _take(self, logits: Rows) -> tuple[Future[Any] | None, list[Row]]:
        """Choose tokens from rows as long as that is possible; returns what the others wait for, and these."""
        for number, row in enumerate(logits):
            if self._unscored:
                self._score_prompt(row)
            elif self._constraint and (awaited := self._constraint.awaited):
                return awaited, list(logits[number:])
            elif not self._accept(row) or self.done.is_set():
                break
        return None, []

    def _score_prompt(self, logits: Row) -> None:
        """Add the log probability of the prompt's next token."""
        sequence, top = self.sequence, self.request.prompt_logprobs
        assert self._prompt_logprobs is not None and top is not None and isinstance(logits, np.ndarray), "asked for"
        self._unscored -= 1
        sequence.logits_from += 1  # should the sequence be computed anew, this row is not needed again
        self._prompt_logprobs.append(token_logprob(logits, self.request.prompt[sequence.logits_from], top))

    def _accept(self, logits: Row) -> bool:
        """Add the next token, or end the answer where its grammar lets none follow; returns whether the token was drafted."""
        raw, top = None, self.request.logprobs
        if top is not None:
            assert isinstance(logits, np.ndarray), "all logits were asked for"
            raw = logits.copy()  # before penalties are written into them
        if self._constraint:
            assert isinstance(logits, np.ndarray), "all logits were asked for"
            allowed = self._constraint.restrict(logits)
            if allowed is None:
                self.conclude("stop")
                return False
            logits = allowed
        token = self._sampler.sample(logits)
        drafted = self._append(token, None if raw is None or top is None else token_logprob(raw, token, top))
        if self._constraint and not self.done.is_set():
            self._constraint.advance(token)
        return drafted

    def conclude(self, reason: FinishReason) -> None:
        """End the answer after the tokens that it has, for a reason that is not in them: its grammar is complete."""
        self._last = self._last or self._started  # an answer of no tokens ends where it begins
        self._first = self._first or self._last
        self._finish(reason)

    def replay(self, token: int, logprob: TokenLogprob | None) -> None:
        """Add the next token of an answer that was computed before, as `accept` adds one that it chose."""
        self._append(token, logprob)

    def replay_prompt(self, logprobs: Iterable[TokenLogprob | None] | None) -> None:
        """Take the log probabilities of the prompt from an answer that was computed before, ahead of its first token."""
        self._prompt_logprobs = None if logprobs is None else list(logprobs)

    def _append(self, token: int, logprob: TokenLogprob | None) -> bool:
        """Add a token, and end the answer if it is the last one; returns whether it was drafted."""
        drafted = self.sequence.append(token)
        if self._logprobs is not None and logprob is not None:
            self._logprobs.append(logprob)
        if self.observer:
            self.observer.on_token(token, logprob)
        self._last = time.monotonic()
        self._first = self._first or self._last
        if token in self._end_ids:
            self._finish("stop")
            return drafted
        if self._in_pieces:
            self._emit(self._stop.push(self._detokenizer.push(token), token))
        if self._stop.matched:
            self._end("stop")
        elif self.sequence.length == self.sequence.max_length:
            self._finish("length")
        return drafted

    def delta(self, piece: Piece, start: int) -> Delta:
        """Return a piece with its tokens, those of prompt and answer from number `start` on; may be called on any thread."""
        text, stop = piece
        tokens = tuple(self.sequence.tokens[start:stop].tolist())
        first = self.sequence.prompt_length
        return Delta(text, tokens, None if self._logprobs is None else tuple(self._logprobs[start - first : stop - first]))

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...] | None:
        """Log probabilities of the tokens so far; None unless they were asked for."""
        return None if self._logprobs is None else tuple(self._logprobs)

    @property
    def prompt_logprobs(self) -> tuple[TokenLogprob | None, ...] | None:
        """Log probabilities of the prompt's tokens that were computed so far; None unless they were asked for."""
        return None if self._prompt_logprobs is None else tuple(self._prompt_logprobs)

    def fail(self, error: BaseException) -> None:
        """End the request, unless it has ended; `result` raises `error`."""
        if self.done.is_set():
            return
        self._error = error
        self._end(None)

    def detach(self, error: EngineError) -> None:
        """End the answer for its reader, for whom `result` raises `error`, and go on computing it."""
        on_end, self._on_end, self._on_piece = self._on_end, None, None
        self._error = error
        self._record(None)
        if on_end:
            on_end()

    def result(self) -> Result:
        """Return the finished answer, or raise the error that the request ended with."""
        if self._error is not None:
            raise self._error
        assert self._finish_reason is not None, "result() of an answer that is not finished"
        tokens = self.sequence.generated
        decode_s = self._last - self._first
        rate = (len(tokens) - 1) / decode_s if len(tokens) > 1 and decode_s > 0 else 0.0
        timings = Timings(self._first - self._started, decode_s, self._first - self._arrived, rate)
        counts = (self.sequence.guessed_tokens, self.sequence.accepted_tokens)
        text, prompt = self._whole_text(tokens), list(self.request.prompt)
        scores = (self._logprobs, self._prompt_logprobs)
        return Result(prompt, tokens, text, self._finish_reason, timings, *counts, *scores, self.cached, self.cached_tokens)

    def _whole_text(self, tokens: list[int]) -> str:
        if self._in_pieces:
            return "".join(self._text)
        ended_by_token = bool(tokens) and tokens[-1] in self._end_ids
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
        try:
            if reason and (on_piece := self._on_piece) and self._emitted < self.sequence.length:
                on_piece(("", self.sequence.length))
            self._finish_reason = reason
            self._kept = []
            if self._constraint:
                self._constraint.close()
            self._record(reason)
            if self.observer:
                self.observer.on_end(reason, None if reason else self._error)
        except BaseException as error:
            self._error = self._error or error
            raise
        finally:  # whoever waits must not wait forever
            self.done.set()
            if on_end := self._on_end:
                on_end()

    def _record(self, reason: FinishReason | None) -> None:
        """Report the end of the request, once. One that was refused for lack of room has not begun."""
        try:
            report = self._reports.pop()  # by one thread only: a reader may leave while the answer ends
        except IndexError:
            return
        if isinstance(self._error, QueueFull):
            return
        end: End = reason if reason else _END_OF.get(type(self._error), "error")
        arrived, now, sequence = self._arrived, time.monotonic(), self.sequence
        started, first = self._started, self._first
        report(
            RequestRecord(
                queue_s=(started or now) - arrived,
                prefill_s=first - started if first and started else 0.0,
                first_token_s=first - arrived if first else 0.0,
                decode_s=self._last - first,
                total_s=now - arrived,
                prompt_tokens=sequence.prompt_length,
                cached_tokens=sequence.cached_tokens,
                generated_tokens=sequence.length - sequence.prompt_length,
                end=end,
                preemptions=sequence.preemptions,
                cached=self.cached,
                adapter=sequence.adapter,
            )
        )

    def _emit(self, piece: str) -> None:
        if piece:
            self._text.append(piece)
            if on_piece := self._on_piece:  # `detach` may clear it at any time
                self._emitted = self.sequence.length
                on_piece((piece, self._emitted))
