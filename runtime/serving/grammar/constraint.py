"""Holds one answer to a grammar: the tokens that may come next, computed while the step runs that gives their logits."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from belle_compile.runtime.serving.candidates import Few, Row
from belle_compile.runtime.serving.grammar.matching import GrammarError, check, make_matcher
from belle_compile.runtime.serving.grammar.source import Grammar, GrammarFailure
from belle_compile.runtime.serving.grammar.workers import quick_workers, slow_workers

# Processor time. A usual mask takes a third of a millisecond, after 1 to 3 ms for the first one of an answer.
_USUAL_S = 0.001
_EXCESS_S = 0.005
_LONG_START_S = 0.02


@dataclass(frozen=True)
class _Mask:
    """The tokens that may come next, of a vocabulary of `size`: `tokens`, or all but these. Both are in ascending order.

    Where nothing may come, `complete` says whether the answer may end there.
    """

    size: int
    tokens: NDArray[np.int64]
    all_but: bool
    complete: bool

    def restrict(self, logits: NDArray[np.float32]) -> Row | None:
        """Return the logits of the allowed tokens, in a new array or in place; None if there are none.

        The model may have more logits than the tokenizer has tokens, which are padding, or fewer.
        """
        tokens = self.tokens[: np.searchsorted(self.tokens, len(logits))]
        if not self.all_but:
            return Few(tokens, logits[tokens]) if len(tokens) else None
        logits[tokens] = -np.inf
        logits[self.size :] = -np.inf
        return logits


class Constraint:
    """The state of a grammar in one answer.

    A token is allowed if the text with it is the beginning of a text that the grammar matches. Tokens of `end_ids` are allowed
    where the text so far matches, and none before the answer has `min_tokens`; stop tokens with a text of their own are allowed
    as text too. If nothing is allowed because only the end could follow, and the answer has no token for its end or not enough
    tokens for it, the answer ends without one.

    The matcher belongs to this answer alone and gets the accepted tokens only. It works on threads that are shared by all
    answers of the process and do not hold the interpreter lock while they match. `begin` is called before the first step,
    `restrict` for each token once no mask is `awaited`, and `advance` after it.

    Masks that take `_EXCESS_S` longer than usual are followed by masks on threads of a low priority, until that time is made
    up for: an answer whose grammar needs much time leaves the usual threads to the others.
    """

    def __init__(self, tokenizer: Any, grammar: Grammar, end_ids: Sequence[int], min_tokens: int, start_s: float = 0.0) -> None:
        """`tokenizer` is llguidance's; `start_s` the processor time that compiling the grammar takes, with the first mask."""
        self._tokenizer, self._grammar, self._min_tokens = tokenizer, grammar, min_tokens
        self._long_start = start_s > _LONG_START_S
        self._excess_s = 0.0  # that masks have taken beyond `_USUAL_S` each, without the first one
        self._eos_ids = np.array(tokenizer.eos_tokens, np.int64)
        self._end_ids = np.array([token for token in end_ids if token < tokenizer.vocab_size], np.int64)
        self._matcher: Any = None
        self._tokens = 0  # of the answer
        self._next: Future[_Mask] | None = None

    def begin(self) -> None:
        """Start to compute the first mask. A second call does nothing: a sequence may be scheduled again from its start."""
        if self._next is None:
            self._next = (slow_workers() if self._long_start else quick_workers()).submit(self._first)

    def advance(self, token: int) -> None:
        """Take the answer's next token, and start to compute the mask of the one after it."""
        workers = slow_workers() if self._excess_s > _EXCESS_S else quick_workers()
        self._next = workers.submit(partial(self._after, token))

    @property
    def awaited(self) -> Future[Any] | None:
        """The mask of the next token while it is computed; None once it is there, or cannot be computed."""
        assert self._next is not None, "`begin` comes first"
        return None if self._next.done() else self._next

    def close(self) -> None:
        """Compute no mask that was not begun: the answer has ended."""
        if self._next:
            self._next.cancel()

    def restrict(self, logits: NDArray[np.float32]) -> Row | None:
        """Return the logits of the tokens that the mask allows, which is not awaited; None if the answer ends here.

        `logits` may be overwritten. Raises `GrammarFailure` when the grammar needs more time or memory than a token may
        take, and when the vocabulary has no token to go on with.
        """
        assert self._next is not None and self._next.done(), "the mask is there"
        mask = self._next.result()
        row = mask.restrict(logits)
        if row is None and not mask.complete:
            raise GrammarFailure("the vocabulary has no token with which the answer could go on")
        return row

    def _first(self) -> _Mask:
        try:
            self._matcher = make_matcher(self._tokenizer, self._grammar.kind, self._grammar.source)
            return self._mask()
        except GrammarError as error:
            raise GrammarFailure(str(error)) from None

    def _after(self, token: int) -> _Mask:
        self._tokens += 1
        started = time.thread_time()
        try:
            self._matcher.consume_token(token)
            check(self._matcher)
            return self._mask()
        except GrammarError as error:
            raise GrammarFailure(str(error)) from None
        finally:
            self._excess_s = max(0.0, self._excess_s + time.thread_time() - started - _USUAL_S)

    def _mask(self) -> _Mask:
        matcher, size = self._matcher, self._tokenizer.vocab_size
        packed = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        check(matcher)
        allowed = np.unpackbits(packed, count=size, bitorder="little").view(np.bool_)
        allowed[self._eos_ids] = False
        complete, early = matcher.is_accepting(), self._tokens < self._min_tokens
        if early:
            complete |= bool(allowed[self._end_ids].any())
            allowed[self._end_ids] = False
        elif complete:
            allowed[self._end_ids] = True
        all_but = 2 * np.count_nonzero(allowed) > size
        return _Mask(size, np.flatnonzero(~allowed if all_but else allowed), all_but, complete)
