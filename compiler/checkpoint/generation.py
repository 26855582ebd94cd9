"""Generation defaults, from generation_config.json and the model card of BELLE-7B."""

from __future__ import annotations

from typing import Any

from belle_compile.compiler.checkpoint.tensors import STAGE
from belle_compile.compiler.errors import CompileError
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.serving.request import SamplingParams

# https://huggingface.co/BelleGroup/BELLE-7B-2M, "Use model"
BELLE = {"max_new_tokens": 200, "temperature": 0.35, "top_k": 30, "top_p": 0.85, "repetition_penalty": 1.2}
# Transformers' values for keys that a generation_config.json leaves out.
TRANSFORMERS = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0}
GREEDY = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}


def generation_defaults(stated: dict[str, Any]) -> dict[str, Any]:
    """Return max_new_tokens, temperature (0 = greedy), top_k (0 = off), top_p and repetition_penalty.

    `stated` is the content of generation_config.json. If it has no sampling setting, as in BELLE's releases, which hold token
    ids only, the values are the model card's. If do_sample is false, they are greedy. If it has some settings, their author
    tuned them for Transformers, so the missing ones are Transformers' defaults instead of the card's. Raises CompileError for a
    value that `SamplingParams` refuses.
    """
    given = {key: _checked(key, value) for key in BELLE if (value := stated.get(key)) is not None}
    if stated.get("do_sample") is False:
        penalty = {"repetition_penalty": given["repetition_penalty"]} if "repetition_penalty" in given else {}
        return {"max_new_tokens": int(given.get("max_new_tokens", BELLE["max_new_tokens"])), **GREEDY, **penalty}
    tuned = stated.get("do_sample") is True or any(key in given for key in TRANSFORMERS)
    defaults = {**BELLE, **(TRANSFORMERS if tuned else {}), **given}
    return {**defaults, "max_new_tokens": int(defaults["max_new_tokens"]), "top_k": int(defaults["top_k"])}


def _checked(key: str, value: Any) -> float:
    is_whole = isinstance(BELLE[key], int)
    expected = "a whole number" if is_whole else "a number"
    if type(value) in (int, float) and (not is_whole or float(value).is_integer()):
        try:
            SamplingParams(**{key: value})
            return value  # type: ignore[no-any-return]  # from JSON
        except EngineError as error:
            expected = error.expected
    raise CompileError(
        STAGE,
        f"key {key} of generation_config.json",
        found=repr(value),
        expected=expected,
        remedy="correct the file or remove the key",
    )
