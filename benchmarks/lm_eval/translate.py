"""What the harness asks for in an engine's terms: token windows, scores of continuations, sampling parameters."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from belle_compile.runtime import Engine, EngineError, Result, SamplingParams
from belle_compile.runtime.tokenizer import Tokenizer

_ROWS = 64  # rows of logits taken to float64 at once
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the harness' names, best first
_SETTINGS = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")


@dataclass(frozen=True)
class Window:
    """Tokens the model reads, and those it must predict at the window's end: `targets[-1]` follows `inputs[-1]`."""

    inputs: tuple[int, ...]
    targets: tuple[int, ...]

    @property
    def start(self) -> int:
        """The input whose prediction is the first target."""
        return len(self.inputs) - len(self.targets)


def window(context: Sequence[int], continuation: Sequence[int], max_length: int) -> Window:
    """A continuation after as much of its context as `max_length` inputs hold; the context is cut from the left.

    The last token of all is predicted and not read, as the harness' Transformers model counts it.
    """
    if not context or not continuation:
        raise EngineError("eval", "a request", found=f"{len(context)} tokens of context and {len(continuation)} to predict",
                          expected="one or more of each")  # fmt: skip
    if len(continuation) > max_length:
        raise EngineError("eval", "a continuation is longer than the context", found=f"{len(continuation)} tokens",
                          expected=f"at most {max_length}", remedy="load with a larger max_length or kv_tokens")  # fmt: skip
    tokens = (*context, *continuation)
    return Window(tokens[-(max_length + 1) : -1], tuple(continuation))


def by_inputs(windows: Sequence[Window]) -> list[list[int]]:
    """Indices of windows with the same inputs, the longest inputs first: choices of one token each are one pass."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, one in enumerate(windows):
        groups.setdefault(one.inputs, []).append(index)
    return sorted(groups.values(), key=lambda group: -len(windows[group[0]].inputs))


def score_windows(engine: Engine, windows: Sequence[Window]) -> list[tuple[float, bool]]:
    """`score` of windows with the same inputs, in one pass of the engine."""
    first = min(one.start for one in windows)
    logits = engine.logits(windows[0].inputs, start=first)
    return [score(logits[one.start - first :], one.targets) for one in windows]


def score(logits: NDArray[np.float32], targets: Sequence[int]) -> tuple[float, bool]:
    """(log probability of `targets`, whether each is its row's most likely token) by float32 `logits` [targets, vocabulary]."""
    assert len(logits) == len(targets)
    total, greedy = 0.0, True
    for first in range(0, len(targets), _ROWS):
        rows = logits[first : first + _ROWS].astype(np.float64)
        chosen = np.asarray(targets[first : first + _ROWS])
        peak = rows.max(axis=1)
        normalizer = peak + np.log(np.exp(rows - peak[:, None]).sum(axis=1))
        total += float((rows[np.arange(len(rows)), chosen] - normalizer).sum())
        greedy = greedy and bool((rows.argmax(axis=1) == chosen).all())
    if not math.isfinite(total):
        raise EngineError("eval", "the model's logits are not finite", found=str(total),
                          remedy="check the engine with belle-compile verify and the checkpoint it was built from")  # fmt: skip
    return total, greedy


def cut_left(prompt: Sequence[int], max_length: int, max_new_tokens: int) -> list[int]:
    """The end of a prompt that leaves room for the answer in `max_length` tokens."""
    room = max_length - max_new_tokens
    if room < 1:
        raise EngineError("eval", "max_gen_toks leaves no room for a prompt", found=f"{max_new_tokens} of {max_length} tokens",
                          remedy="lower it, or load with a larger max_length or kv_tokens")  # fmt: skip
    return list(prompt[-room:])


def sampling_params(settings: Mapping[str, Any], default_max_tokens: int, sample: int) -> SamplingParams:
    """The harness' `gen_kwargs` as sampling parameters: greedy unless told otherwise, and never the engine's own defaults.

    Requests that sample get seeds that differ by their number `sample`, so that a run is repeatable and repeats are not equal.
    Raises `EngineError` for a setting that the engine does not have and that would change answers.
    """
    unknown = {name: value for name, value in settings.items() if name not in {"until", "do_sample", *_LENGTHS, *_SETTINGS}}
    if unknown.pop("num_beams", 1) != 1 or unknown:
        found = ", ".join(f"{name}={settings[name]!r}" for name in sorted(unknown) or ["num_beams"])
        expected = ", ".join(("until", "do_sample", "max_gen_toks", *_SETTINGS))
        raise EngineError("eval", "a generation setting", found=found, expected=f"only {expected}")
    chosen = {name: settings[name] for name in _SETTINGS if settings.get(name) is not None}
    temperature = float(chosen.pop("temperature", 1.0 if settings.get("do_sample") else 0.0))
    if settings.get("do_sample") is False:
        temperature = 0.0
    lengths = [int(settings[name]) for name in _LENGTHS if settings.get(name) is not None]
    until = settings.get("until") or ()
    stop = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
    neutral: dict[str, Any] = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "min_tokens": 0, "repetition_penalty": 1.0, "seed": 1234}
    params = SamplingParams(
        temperature=temperature, max_new_tokens=lengths[0] if lengths else default_max_tokens, stop=stop, **neutral | chosen
    )
    return dataclasses.replace(params, seed=(params.seed or 0) + sample)


def special_stops(tokenizer: Tokenizer, stop: Iterable[str]) -> frozenset[int]:
    """Ids of the stop strings that are special tokens: an answer's text leaves those out, so no text can match them."""
    ids = (tokenizer.encode(text, add_bos=False) for text in stop)
    return frozenset(found[0] for found in ids if len(found) == 1 and not tokenizer.decode(found))


def answer_text(tokenizer: Tokenizer, result: Result, specials: frozenset[int]) -> str:
    """The text of an answer before its first stop string, special tokens among `specials` included."""
    end = next((index for index, token in enumerate(result.token_ids) if token in specials), None)
    if end is None:
        return result.text
    # A stop string of plain text may come before the token, so the shorter of the two is right.
    return min(result.text, tokenizer.decode(result.token_ids[:end]), key=len)
