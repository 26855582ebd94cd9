"""The grammars of an engine: each is tried out once, and every answer gets a matcher of its own."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.serving.grammar.constraint import Constraint
from belle_compile.runtime.serving.grammar.matching import make_tokenizer
from belle_compile.runtime.serving.grammar.source import Grammar, invalid
from belle_compile.runtime.serving.grammar.trial import Trial

MOST_REMEMBERED = 4096  # grammars that were tried out, by their digests


class Grammars:
    """Grammars over the vocabulary of a tokenizer. Any thread may call all methods.

    The vocabulary is loaded by the first call that needs it. llguidance holds the interpreter lock meanwhile, so that steps
    wait for it: 0.2 s for 49,152 tokens and more than 1 s for 250,880. `load` does that ahead of requests.
    """

    def __init__(self, tokenizer_json: Callable[[], str], eos_ids: Sequence[int]) -> None:
        """`eos_ids` are the tokens that the model ends a sequence with."""
        self._tokenizer_json, self._eos_ids = tokenizer_json, list(eos_ids)
        self._lock = threading.Lock()
        self._tokenizer: Any = None
        self._trial: Trial | None = None
        self._accepted: OrderedDict[bytes, float] = OrderedDict()  # seconds that it took; least recently used first

    def load(self) -> None:
        """Load the vocabulary; raises `EngineError` without llguidance and for a tokenizer that it does not know."""
        with self._lock:
            self._loaded()

    def check(self, grammar: Grammar) -> float:
        """Return the processor time in seconds that it takes to compile a grammar and to compute its first mask. Raises
        `EngineError` for one that is not valid, or takes too long or too much memory.

        A grammar that was not seen before takes some milliseconds, and at most `matching.CPU_S` of processor time; others wait
        meanwhile only if theirs is new too. The first one of all waits for the process that tries grammars out to start.
        """
        digest = hashlib.sha256(f"{grammar.kind} {grammar.source}".encode()).digest()
        with self._lock:
            trial = self._loaded()
            if digest in self._accepted:
                self._accepted.move_to_end(digest)
                return self._accepted[digest]
        reason, seconds = trial.judge(grammar.kind, grammar.source)
        if reason:
            raise invalid(found=f"{_NAMES[grammar.kind]} that cannot be used ({reason})")
        with self._lock:
            self._accepted[digest] = seconds
            if len(self._accepted) > MOST_REMEMBERED:
                self._accepted.popitem(last=False)
        return seconds

    def constraint(self, grammar: Grammar, end_ids: Sequence[int], min_tokens: int) -> Constraint:
        """Return what holds an answer to a grammar; see `Constraint`. A grammar that was not checked is checked now."""
        seconds = self.check(grammar)
        return Constraint(self._tokenizer, grammar, end_ids, min_tokens, seconds)

    def _loaded(self) -> Trial:
        """Load the vocabulary unless it is loaded. The lock must be held."""
        if self._trial is None:
            tokenizer_json = self._tokenizer_json()
            try:
                self._tokenizer = make_tokenizer(tokenizer_json, self._eos_ids)
            except ImportError:
                remedy = "install belle-compile[serve]"
                raise EngineError("sampling", "grammars need the package llguidance", remedy=remedy) from None
            except Exception as error:  # the library raises ValueError, and what its tokenizer raises
                raise EngineError(
                    "sampling", "this engine's tokenizer cannot be used with grammars", found=str(error)
                ) from error
            self._trial = Trial(tokenizer_json, self._eos_ids)
        return self._trial


_NAMES = {"json_object": "a JSON object", "json_schema": "a JSON schema", "regex": "a regular expression", "lark": "a grammar"}
