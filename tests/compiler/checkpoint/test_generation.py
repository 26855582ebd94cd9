"""Generation defaults: what is stated, and what is filled in."""

from __future__ import annotations

from typing import Any

import pytest

from belle_compile.compiler.checkpoint.generation import BELLE, generation_defaults
from belle_compile.compiler.errors import CompileError


@pytest.mark.parametrize("stated", [{}, {"bos_token_id": 1, "eos_token_id": 2}, {"temperature": None, "do_sample": None}])
def test_nothing_stated_gives_the_model_card(stated: dict[str, Any]) -> None:
    assert generation_defaults(stated) == BELLE


def test_a_length_alone_is_no_sampling_setting() -> None:
    assert generation_defaults({"max_new_tokens": 64}) == BELLE | {"max_new_tokens": 64}


@pytest.mark.parametrize("stated", [{"do_sample": True, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0.6, "top_p": 0.9}])
def test_a_tuned_config_is_completed_as_transformers_does(stated: dict[str, Any]) -> None:
    assert generation_defaults(stated) == {
        "max_new_tokens": 200,
        "temperature": 0.6,
        "top_k": 50,
        "top_p": 0.9,
        "repetition_penalty": 1.0,
    }


def test_do_sample_false_is_greedy() -> None:
    assert generation_defaults({"do_sample": False, "temperature": 0.7, "repetition_penalty": 1.1}) == {
        "max_new_tokens": 200,
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "repetition_penalty": 1.1,
    }


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("temperature", "0.7", "'0.7', expected a number"),
        ("temperature", -1, "-1, expected 0 or more"),
        ("top_k", -1, r"-1, expected 0 \(off\) or more"),
        ("top_k", 2.5, "2.5, expected a whole number"),
        ("top_p", 0.0, "0.0, expected above 0 and at most 1"),
        ("repetition_penalty", float("nan"), "nan, expected above 0"),
        ("max_new_tokens", True, "True, expected a whole number"),
    ],
)
def test_values_no_request_may_have_are_refused(key: str, value: object, found: str) -> None:
    message = rf"^checkpoint: key {key} of generation_config\.json: found {found}; correct the file or remove the key\.$"
    with pytest.raises(CompileError, match=message):
        generation_defaults({key: value})
