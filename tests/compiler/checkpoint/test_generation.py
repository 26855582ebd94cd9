"""Generation defaults: what is stated, and what is filled in."""

from __future__ import annotations

from typing import Any

import pytest

from compiler.checkpoint.generation import BELLE, generation_defaults


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
