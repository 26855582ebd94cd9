"""A request: what the caller asked for (`SamplingParams`), and the resolved record that is served (`Request`)."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import islice
from numbers import Integral, Real
from typing import Any, cast

import numpy as np

from belle_compile.runtime.artifact import GenerationDefaults
from belle_compile.runtime.control_tokens import check_text
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.serving.grammar.source import Grammar

KEY_VERSION = 4  # version of the fields that `Request.key` digests, and of their encoding
# Fields of a request that are not in its key, because they change no answer.
NOT_IN_KEY = frozenset({"prompt_lookup"})

GREEDY_BELOW = 1e-6  # below this temperature the most likely token is taken: dividing by it would overflow float32

MAX_SEED = 2**64 - 1
MAX_ANSWERS = 128  # of one prompt
MAX_LOGPROBS = 20  # alternatives of a token
MAX_BIASES = 1024
MAX_STOPS = 64  # strings, and as many ids
MAX_STOP_LENGTH = 1024  # characters
MAX_SALT_LENGTH = 1024  # characters

Biases = tuple[tuple[int, float], ...]  # (token id, bias), in ascending order of ids


@dataclass(frozen=True)
class SamplingParams:
    """How a request is sampled. A value that is None comes from the engine's generation defaults.

    `temperature` 0 takes the most likely token. `top_k` 0 and `top_p` 1 are off. `repetition_penalty` counts prompt and
    answer. `seed` makes a request repeatable, whatever it is batched with. An answer ends after `max_new_tokens`, at an
    end-of-sequence token unless `ignore_eos`, or before the first of the `stop` strings, which is left out of the text. The
    engine's own stop strings, if it has any, go with its end-of-sequence tokens: they end answers too, unless `ignore_eos`.
    A stop string may contain the names of special tokens, though these have no text in an answer.
    `prompt_lookup` is the number of tokens that may be guessed per step from prompt and answer so far (0: none): answers that
    quote become faster, and no answer changes.

    `min_p` removes tokens less likely than this share of the most likely token's probability (0: off). `presence_penalty` is
    subtracted from the logit of each token that the answer has, and `frequency_penalty` as many times as the answer has it.
    As in OpenAI's API, the prompt does not count. `logit_bias` maps token ids to what is added to their logits; it is stored
    as sorted pairs. No token that would end the answer is chosen before the answer has `min_tokens` tokens; stop strings end
    it nevertheless. `stop_token_ids` end an answer even with `ignore_eos`, and are left out of the text. The order in which
    all of these apply is that of `sampling.Sampler`.

    `logprobs` asks for the log probability of each token of the answer and of so many of the most likely tokens in its place,
    `prompt_logprobs` for those of the prompt's tokens; None asks for none. `runtime/serving/logprobs.py` defines them.

    `grammar` is what the text of the answer must match: see `Grammar` and `runtime/serving/grammar/constraint.py`.

    `n` answers are given to the prompt. All are equal if greedy. With a seed, answer 0 is the answer of n=1, and answer i > 0
    draws its random numbers from `numpy.random.SeedSequence(seed, spawn_key=(i,))`.

    Requests with different values of `cache_salt` share nothing that was cached, neither prefixes nor results: what one tenant
    has asked cannot be found out by another from the time that an answer takes.

    `adapter` is the name of one that was loaded (`Engine.load`, `Engine.adapters`); None is the engine's model alone.
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
    min_p: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | Biases = ()
    min_tokens: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    cache_salt: str = ""
    grammar: Grammar | None = None
    adapter: str | None = None

    def __post_init__(self) -> None:
        """Raise `EngineError` for a value of another type or outside of its range; sequences and mappings become tuples."""
        _check_number("temperature", self.temperature, lambda v: 0 <= v < math.inf, "0 or more", optional=True)
        _check_whole("top_k", self.top_k, 0, math.inf, "0 (off) or more", optional=True)
        _check_number("top_p", self.top_p, lambda v: 0 < v <= 1, "above 0 and at most 1", optional=True)
        _check_number("repetition_penalty", self.repetition_penalty, lambda v: 0 < v < math.inf, "above 0", optional=True)
        _check_whole("seed", self.seed, 0, MAX_SEED, "0 or more, below 2 to the power of 64", optional=True)
        _check_whole("max_new_tokens", self.max_new_tokens, 1, math.inf, "1 or more", optional=True)
        _check_whole("prompt_lookup", self.prompt_lookup, 0, math.inf, "0 (off) or more")
        _check_number("min_p", self.min_p, lambda v: 0 <= v <= 1, "0 (off) to 1", optional=True)
        for name in ("presence_penalty", "frequency_penalty"):
            _check_number(name, getattr(self, name), lambda v: -2 <= v <= 2, "-2 to 2")
        _check_whole("min_tokens", self.min_tokens, 0, math.inf, "0 (off) or more", optional=True)
        for name in ("logprobs", "prompt_logprobs"):
            _check_whole(name, getattr(self, name), 0, MAX_LOGPROBS, f"0 to {MAX_LOGPROBS} alternatives", optional=True)
        _check_whole("n", self.n, 1, MAX_ANSWERS, f"1 to {MAX_ANSWERS} answers")
        if not isinstance(self.ignore_eos, (bool, np.bool_)):
            raise _refusal("ignore_eos", self.ignore_eos, "True or False")
        if not isinstance(self.cache_salt, str) or len(self.cache_salt) > MAX_SALT_LENGTH:
            raise _refusal("cache_salt", self.cache_salt, f"text of at most {MAX_SALT_LENGTH} characters")
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise _refusal("grammar", self.grammar, "a Grammar")
        if self.adapter is not None and not isinstance(self.adapter, str):
            raise _refusal("adapter", self.adapter, "the name of an adapter")
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        object.__setattr__(self, "stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))


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
            remedy = "load with more memory for the KV cache"
            raise EngineError("request", what, found=f"{tokens} tokens", expected=expected, remedy=remedy)


@dataclass(frozen=True)
class RequestDefaults:
    """What an engine adds to a request: values that it leaves open, the ids that end an answer, the longest sequence, and the
    number of tokens in the vocabulary."""

    generation: GenerationDefaults
    eos_ids: tuple[int, ...]
    limits: Limits
    vocab_size: int


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
    other random numbers each time. `answer` is the number of this answer among the `n` of its prompt; a request is for one of
    them. `adapter` is the digest of the adapter with its scale, "" for none: an adapter of another name with the same files
    gives the same answer. The other fields are those of `SamplingParams`.
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
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Biases
    min_tokens: int
    stop_token_ids: tuple[int, ...]
    logprobs: int | None
    prompt_logprobs: int | None
    answer: int
    cache_salt: str
    grammar: Grammar | None
    adapter: str

    @classmethod
    def resolve(cls, prompt: Sequence[int], params: SamplingParams, defaults: RequestDefaults, adapter: str = "") -> Request:
        """Return the first of the answers that `params` asks for, with what it leaves open filled in; `adapter` is the digest
        of the adapter that it names.

        Raises `EngineError` when prompt and answer are too long, and for token ids outside of the vocabulary. A
        `max_new_tokens` of `params` is kept or refused, and so is `min_tokens`. The engine's defaults are cut to the room after
        the prompt, and to the longest answer.
        """
        generation, limits = defaults.generation, defaults.limits
        limits.check(len(prompt) + 1, "the prompt and one token are too long")
        room = limits.capacity - len(prompt)
        max_new_tokens = min(generation.max_new_tokens, room) if params.max_new_tokens is None else int(params.max_new_tokens)
        limits.check(len(prompt) + max_new_tokens, "prompt and max_new_tokens are too long")
        min_tokens = min(generation.min_tokens, max_new_tokens) if params.min_tokens is None else int(params.min_tokens)
        if min_tokens > max_new_tokens:
            raise _refusal("min_tokens", min_tokens, f"at most {max_new_tokens}, the longest answer")
        biases, vocab_size = cast(Biases, params.logit_bias), defaults.vocab_size
        _check_vocabulary("logit_bias", [token for token, _ in biases], vocab_size)
        _check_vocabulary("stop_token_ids", params.stop_token_ids, vocab_size)

        def resolved(name: str) -> Any:
            value = getattr(params, name)
            return getattr(generation, name) if value is None else value

        return cls(
            prompt=tuple(prompt),
            max_new_tokens=max_new_tokens,
            temperature=float(resolved("temperature")),
            top_k=top_k if (top_k := int(resolved("top_k"))) < vocab_size else 0,
            top_p=float(resolved("top_p")),
            repetition_penalty=float(resolved("repetition_penalty")),
            seed=None if params.seed is None else int(params.seed),
            stop=params.stop if params.ignore_eos else tuple(dict.fromkeys((*params.stop, *generation.stop))),
            eos_ids=() if params.ignore_eos else tuple(defaults.eos_ids),
            prompt_lookup=int(params.prompt_lookup),
            min_p=float(resolved("min_p")),
            presence_penalty=float(params.presence_penalty),
            frequency_penalty=float(params.frequency_penalty),
            logit_bias=tuple((token, bias) for token, bias in biases if bias),
            min_tokens=min_tokens,
            stop_token_ids=params.stop_token_ids,
            logprobs=None if params.logprobs is None else int(params.logprobs),
            prompt_logprobs=None if params.prompt_logprobs is None else int(params.prompt_logprobs),
            answer=0,
            cache_salt=params.cache_salt,
            grammar=params.grammar,
            adapter=adapter,
        )

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken, so that nothing depends on random numbers."""
        return self.temperature < GREEDY_BELOW

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end the answer and are left out of its text: `eos_ids` and `stop_token_ids`."""
        return (*self.eos_ids, *self.stop_token_ids)

    def answers(self, n: int) -> list[Request]:
        """Return the requests for `n` answers to the prompt, this one first.

        Greedy answers are equal, and so are their requests and keys.
        """
        return [self, *(self if self.greedy else replace(self, answer=i) for i in range(1, n))]

    def key(self, engine: EngineIdentity) -> str:
        """SHA-256 in hex of the engine and of every field of this record (a subclass's too) but those in `NOT_IN_KEY`.

        Requests with the same key get the same answer, provided that they are greedy or have a seed.
        """
        kind: Any = type(self)
        kept = [field for field in _encoded_names(kind) if field[0] not in NOT_IN_KEY]
        request = b"".join([name + encode(getattr(self, field)) for field, name in kept])
        digest = _digest_of_engine(engine).copy()
        digest.update(b"t%d:" % len(kept) + request)
        return digest.hexdigest()


def encode(value: object) -> bytes:
    """Bytes that are equal only for values of equal types, contents and nesting.

    The types are None, bool, int, float, str, `Grammar` and tuples of these.
    """
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
        case tuple() if set(map(type, value)) == {int}:  # the same bytes as below, quickly: prompts are long
            return f"t{len(value)}:i{';i'.join(map(str, value))};".encode()
        case tuple():
            return b"t%d:" % len(value) + b"".join(map(encode, value))
        case Grammar():
            return b"g" + encode((value.kind, value.source))
    raise TypeError(f"a {type(value).__name__} in a request's key: encode() needs a tag for this type")


@cache
def _encoded_names(record: type[Any]) -> tuple[tuple[str, bytes], ...]:
    """Return the names of a record's fields, and how `encode` begins the pairs of each and its value."""
    return tuple((field.name, b"t2:" + encode(field.name)) for field in fields(record))


@cache
def _digest_of_engine(engine: EngineIdentity) -> hashlib._Hash:
    """Return what `Request.key` digests first: the beginning of an encoded tuple, whose last item is that of the request."""
    named = tuple((field.name, getattr(engine, field.name)) for field in fields(engine))
    return hashlib.sha256(b"t4:" + b"".join(map(encode, ("belle-request", KEY_VERSION, named))))


def _stop_strings(stop: Any) -> tuple[str, ...]:
    texts = _several("stop", "strings", [stop] if isinstance(stop, str) or not isinstance(stop, Iterable) else stop, MAX_STOPS)
    for text in texts:
        if not isinstance(text, str):
            raise EngineError("sampling", "stop", found=_shown(text), expected="text, or several")
        if not text:
            raise EngineError("sampling", "stop", found="an empty string", remedy="leave it out")
        check_text(text, "stop", stage="sampling")
        if len(text) > MAX_STOP_LENGTH:
            found, expected = f"a string of {len(text)} characters", f"at most {MAX_STOP_LENGTH}"
            raise EngineError("sampling", "stop", found=found, expected=expected)
    return tuple(texts)


def _token_ids(name: str, ids: Any) -> tuple[int, ...]:
    """Return token ids in ascending order, each once."""
    if isinstance(ids, str) or not isinstance(ids, Iterable):
        raise _refusal(name, ids, "several token ids")
    items = _several(name, "token ids", ids, MAX_STOPS)
    for token in items:
        _check_whole(name, token, 0, math.inf, "token ids, 0 or more")
    return tuple(sorted({int(token) for token in items}))


def _biases(biases: Any) -> Biases:
    """Return the biases of a mapping, or of pairs as this function returns them, in ascending order of token ids."""
    if not isinstance(biases, (Mapping, tuple)):
        raise _refusal("logit_bias", biases, "a mapping of token ids to numbers")
    pairs = _several("logit_bias", "entries", biases.items() if isinstance(biases, Mapping) else biases, MAX_BIASES)
    for pair in pairs:
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise _refusal("logit_bias", pair, "pairs of a token id and a number")
        _check_whole("logit_bias", pair[0], 0, math.inf, "token ids, 0 or more")
        _check_number("logit_bias", pair[1], lambda v: -100 <= v <= 100, "biases from -100 to 100")
    bias_of = {int(token): float(bias) for token, bias in pairs}
    if len(bias_of) < len(pairs):
        raise EngineError("sampling", "logit_bias", found="a token id twice", expected="each token id once")
    return tuple(sorted(bias_of.items()))


def _several(name: str, kind: str, values: Iterable[Any], most: int) -> list[Any]:
    """Return the values; raises `EngineError` when there are more than `most`, without reading them all."""
    items = list(islice(values, most + 1))
    if len(items) > most:
        raise EngineError("sampling", name, found=f"more than {most} {kind}", expected=f"at most {most}")
    return items


def _check_vocabulary(name: str, ids: Sequence[int], vocab_size: int) -> None:
    if ids and max(ids) >= vocab_size:
        raise _refusal(name, max(ids), f"token ids of the vocabulary, 0 to {vocab_size - 1}")


def _check_number(name: str, value: Any, holds: Callable[[float], bool], expected: str, *, optional: bool = False) -> None:
    if value is None and optional:
        return
    try:
        valid = _is_number(value) and holds(float(value))
    except OverflowError:  # a whole number that no float can hold
        valid = False
    if not valid:
        raise _refusal(name, value, expected)


def _check_whole(name: str, value: Any, least: int, most: float, expected: str, *, optional: bool = False) -> None:
    if (type(value) is int and least <= value <= most) or (value is None and optional):  # most of them, quickly
        return
    whole = f"a whole number, {expected}"
    _check_number(name, value, lambda v: isinstance(value, Integral) or v.is_integer(), whole, optional=optional)
    if not least <= value <= most:
        raise _refusal(name, value, expected)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) or (isinstance(value, Real) and not isinstance(value, bool))


def _refusal(name: str, value: Any, expected: str) -> EngineError:
    found = _shown(value) if _is_number(value) else f"{_shown(value)} ({type(value).__name__})"
    return EngineError("sampling", name, found=found, expected=expected)


def _shown(value: Any) -> str:
    """Return a value for an error message, at most 80 characters of it."""
    try:
        text = str(value) if _is_number(value) else repr(value)
    except ValueError:  # Python writes no number of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."
