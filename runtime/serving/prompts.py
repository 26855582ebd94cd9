"""What callers pass as prompts: the one place that takes it apart and says what does not fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.prompt import Message
from belle_compile.runtime.serving.request import Request, SamplingParams

# A question, a chat of {"role", "content"} messages, token ids, to which neither template nor BOS is added, or a request that
# `Engine.resolve` returned, which has its sampling parameters.
Prompt = str | Sequence[Message] | Sequence[int] | Request


class Encoding(TypedDict, total=False):
    """How prompts become tokens: the arguments of `Engine.encode`, which says what they mean."""

    raw: bool
    parse_special: bool | None
    chat_template_kwargs: Mapping[str, Any] | None


_ONE = "text, chat messages or token ids"


def as_batch(prompts: Any) -> list[Any]:
    """Return the prompts of a batch. One prompt is a batch of its own.

    Each is a string, a request or a list of one of the other kinds. Raises `EngineError` for anything else: also for sets and
    generators, which have no order or no length.
    """
    if isinstance(prompts, (str, Request)):
        return [prompts]
    items = _items(prompts, "prompts", f"{_ONE}, or a list of these")
    if items and isinstance(items[0], (int, float, np.number, Mapping)):
        return [items]
    return [as_prompt(item, f"prompts[{number}]") for number, item in enumerate(items)]


def as_prompt(prompt: Any, name: str = "the prompt") -> Any:
    """Return one prompt: a string, a request or a list. Raises `EngineError` that names it for anything else."""
    return prompt if isinstance(prompt, (str, Request)) else _items(prompt, name, _ONE)


def as_params(params: Any, count: int) -> list[SamplingParams | None]:
    """Return the sampling parameters of each of `count` prompts; raises `EngineError` for what are none."""
    if params is None or isinstance(params, SamplingParams):
        return [params] * count
    if not isinstance(params, (list, tuple)):
        raise _wrong("params", params, "SamplingParams, or a list of them, one a prompt")
    for number, each in enumerate(params):
        if each is not None and not isinstance(each, SamplingParams):
            raise _wrong(f"params[{number}]", each, "SamplingParams or None")
    if len(params) != count:
        raise EngineError("request", "sampling parameters", found=str(len(params)), expected=f"{count}, one a prompt")
    return list(params)


def as_token_ids(ids: Any, vocab_size: int, name: str = "the prompt") -> list[int]:
    """Return token ids as a list of Python's numbers; raises `EngineError` where there are none, or for what is none."""
    items = _items(ids, name, _ONE)
    if not items:
        raise EngineError("request", name, found="no tokens", expected=_ONE)
    wrong = next((kind for kind in set(map(type, items)) if not _is_whole(kind)), None)
    if wrong:
        place = next(number for number, item in enumerate(items) if type(item) is wrong)
        raise EngineError("request", name, found=f"{wrong.__name__} in place {place}", expected=_ONE)
    if min(items) < 0 or max(items) >= vocab_size:
        found = str(max(items) if max(items) >= vocab_size else min(items))[:40]
        raise EngineError("request", "a token id", found=found, expected=f"0 to {vocab_size - 1}")
    return list(map(int, items))


def as_flag(name: str, value: Any) -> bool:
    """Return an argument that is True or False; raises `EngineError` that names it for anything else."""
    if not isinstance(value, (bool, np.bool_)):
        raise _wrong(name, value, "True or False")
    return bool(value)


def as_whole(name: str, value: Any, stage: str = "request") -> int:
    """Return an argument that is a whole number; raises `EngineError` that names it for anything else."""
    if not _is_whole(type(value)):
        raise _wrong(name, value, "a whole number", stage)
    return int(value)


def require(name: str, value: Any, kind: type, stage: str = "request") -> None:
    """Raise `EngineError` that names an argument which is neither None nor of this kind."""
    if value is not None and not isinstance(value, kind):
        raise _wrong(name, value, f"{kind.__name__} or None", stage)


def _items(value: Any, name: str, expected: str) -> list[Any]:
    if isinstance(value, (bytes, bytearray, memoryview)):
        raise EngineError("request", name, found=type(value).__name__, expected=expected, remedy="decode it first")
    if not isinstance(value, Sequence) and hasattr(value, "__array__"):
        array = np.asarray(value)
        if array.ndim == 0 or (array.size and array.dtype.kind not in "iu"):
            found = f"{type(value).__name__} of {array.dtype}" + (" without dimensions" if array.ndim == 0 else "")
            raise EngineError("request", name, found=found, expected=expected)
        items: list[Any] = array.tolist()
        return items
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise _wrong(name, value, expected)
    return list(value)


def _is_whole(kind: type) -> bool:
    return issubclass(kind, (int, np.integer)) and not issubclass(kind, bool)


def _wrong(name: str, value: Any, expected: str, stage: str = "request") -> EngineError:
    text = repr(value) if isinstance(value, (str, int, float, type(None))) else ""
    found = f"{text} ({type(value).__name__})" if 0 < len(text) <= 40 else type(value).__name__
    return EngineError(stage, name, found=found, expected=expected)
