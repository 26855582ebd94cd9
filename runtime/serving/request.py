"""A request: what the caller asked for (`SamplingParams`), and the resolved record that is served (`Request`)."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

from belle_compile.runtime.artifact import GenerationDefaults
from belle_compile.runtime.errors import EngineError

KEY_VERSION = 1  # version of the fields that `Request.key` digests, and of their encoding
# Fields of a request that are not in its key, because they change no answer.
NOT_IN_KEY = frozenset({"prompt_lookup"})


@dataclass(frozen=True)
class SamplingParams:
    """How a request is sampled. A value that is None comes from the engine's generation defaults.

    `temperature` 0 takes the most likely token. `top_k` 0 and `top_p` 1 are off. `repetition_penalty` counts prompt and
    answer. `seed` makes a request repeatable, whatever it is batched with. An answer ends after `max_new_tokens`, at an
    end-of-sequence token unless `ignore_eos`, or before the first of the `stop` strings, which is left out of the text.
    `prompt_lookup` is the number of tokens that may be guessed per step from prompt and answer so far (0: none): answers that
    quote become faster, and no answer changes.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    prompt_lookup: int = 0

    def __post_init__(self) -> None:
        """Raise `EngineError` for a value of another type or outside of its range; a single stop string becomes a tuple."""
        is_list = isinstance(self.stop, Iterable) and not isinstance(self.stop, str)
        object.__setattr__(self, "stop", tuple(self.stop) if is_list else (self.stop,))
        _check_number("temperature", self.temperature, lambda v: 0 <= v < math.inf, "0 or more")
        _check_whole("top_k", self.top_k, 0, "0 (off) or more")
        _check_number("top_p", self.top_p, lambda v: 0 < v <= 1, "above 0 and at most 1")
        _check_number("repetition_penalty", self.repetition_penalty, lambda v: 0 < v < math.inf, "above 0")
        _check_whole("max_new_tokens", self.max_new_tokens, 1, "1 or more")
        _check_whole("seed", self.seed, 0, "0 or more")
        _check_whole("prompt_lookup", self.prompt_lookup, 0, "0 (off) or more")
        for text in self.stop:
            if not isinstance(text, str):
                raise EngineError("sampling", "a stop string", found=repr(text), expected="text")
            if not text:
                raise EngineError("sampling", "a stop string is empty", remedy="leave it out")


@dataclass(frozen=True)
class Limits:
    """Longest sequences, in tokens: of the engine's context, and of the KV cache as it was loaded."""

    max_context: int
    cache_tokens: int

    @property
    def capacity(self) -> int:
        """Tokens of the longest sequence that can be served."""
        return min(self.max_context, self.cache_tokens)

    def check(self, tokens: int, what: str) -> None:
        """Raise `EngineError` when a sequence of `tokens` tokens can never be served; `what` names what is too long."""
        if tokens > self.max_context:
            expected = f"at most {self.max_context}, the engine's longest context"
            raise EngineError("request", what, found=f"{tokens} tokens", expected=expected, remedy="shorten it")
        if tokens > self.cache_tokens:
            expected = f"at most {self.cache_tokens}, the KV cache's capacity"
            raise EngineError("request", what, found=f"{tokens} tokens", expected=expected, remedy="load with more kv_tokens")


@dataclass(frozen=True)
class RequestDefaults:
    """What an engine adds to a request: values that it leaves open, the ids that end an answer, and the longest sequence."""

    generation: GenerationDefaults
    eos_ids: tuple[int, ...]
    limits: Limits


@dataclass(frozen=True)
class EngineIdentity:
    """What computes an answer: the manifest's digest, the version of the runtime, the kernels that were chosen among those
    that the engine carries, and the number of ranks."""

    digest: str
    runtime_version: str
    kernels: str
    ranks: int


@dataclass(frozen=True)
class Request:
    """A request with every default resolved: all that its answer depends on besides the engine.

    An answer ends at one of the `eos_ids`, which are empty when end-of-sequence tokens are ignored. A `seed` of None draws
    other random numbers each time. The other fields are those of `SamplingParams`.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    seed: int | None
    stop: tuple[str, ...]
    eos_ids: tuple[int, ...]
    prompt_lookup: int

    @classmethod
    def resolve(cls, prompt: Sequence[int], params: SamplingParams, defaults: RequestDefaults) -> Request:
        """Fill in what `params` leaves open; raises `EngineError` when prompt and answer are too long.

        A `max_new_tokens` of `params` is kept or refused. The engine's default is cut to the room after the prompt.
        """
        generation, limits = defaults.generation, defaults.limits
        limits.check(len(prompt) + 1, "the prompt and one token are too long")
        room = limits.capacity - len(prompt)
        max_new_tokens = min(generation.max_new_tokens, room) if params.max_new_tokens is None else int(params.max_new_tokens)
        limits.check(len(prompt) + max_new_tokens, "prompt and max_new_tokens are too long")

        def resolved(name: str) -> Any:
            value = getattr(params, name)
            return getattr(generation, name) if value is None else value

        return cls(
            prompt=tuple(prompt),
            max_new_tokens=max_new_tokens,
            temperature=float(resolved("temperature")),
            top_k=int(resolved("top_k")),
            top_p=float(resolved("top_p")),
            repetition_penalty=float(resolved("repetition_penalty")),
            seed=None if params.seed is None else int(params.seed),
            stop=params.stop,
            eos_ids=() if params.ignore_eos else tuple(defaults.eos_ids),
            prompt_lookup=int(params.prompt_lookup),
        )

    def key(self, engine: EngineIdentity) -> str:
        """SHA-256 in hex of the engine and of every field of this record (a subclass's too) but those in `NOT_IN_KEY`.

        Requests with the same key get the same answer, provided that they are greedy or have a seed.
        """
        request = tuple(item for item in _named_fields(self) if item[0] not in NOT_IN_KEY)
        return hashlib.sha256(encode(("belle-request", KEY_VERSION, _named_fields(engine), request))).hexdigest()


def encode(value: object) -> bytes:
    """Bytes that are equal only for values of equal types, contents and nesting: None, bool, int, float, str and tuples."""
    match value:
        case None:
            return b"n"
        case bool():  # before int, of which bool is a subclass
            return b"b1" if value else b"b0"
        case int():
            return b"i%d;" % value
        case float():
            return b"f" + struct.pack(">d", value)
        case str():
            text = value.encode("utf-8", "surrogatepass")
            return b"s%d:" % len(text) + text
        case tuple():
            return b"t%d:" % len(value) + b"".join(map(encode, value))
    raise TypeError(f"a {type(value).__name__} in a request's key: encode() needs a tag for this type")


def _named_fields(record: Request | EngineIdentity) -> tuple[tuple[str, object], ...]:
    return tuple((field.name, getattr(record, field.name)) for field in fields(record))


def _check_number(name: str, value: Any, holds: Callable[[Any], bool], expected: str) -> None:
    if value is not None and not (_is_number(value) and holds(value)):
        raise _refusal(name, value, expected)


def _check_whole(name: str, value: Any, least: int, expected: str) -> None:
    _check_number(name, value, lambda v: isinstance(v, Integral) or float(v).is_integer(), f"a whole number, {expected}")
    _check_number(name, value, lambda v: v >= least, expected)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _refusal(name: str, value: Any, expected: str) -> EngineError:
    found = str(value) if _is_number(value) else f"{value!r} ({type(value).__name__})"
    return EngineError("sampling", name, found=found, expected=expected)
