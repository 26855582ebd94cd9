"""Generation defaults: what files mean, as in Transformers, what is filled in, and what a user changes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from belle_compile.compiler.checkpoint import open_checkpoint
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.generation import BELLE, GREEDY, SAMPLING, changed_defaults, generation_defaults
from belle_compile.runtime.artifact import GenerationDefaults
from tests.compiler.checkpoint.models import LLAMA_CONFIG, write_json

OWN_TEMPLATE = {"chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}"}


@pytest.mark.parametrize("stated", [{}, {"bos_token_id": 1, "eos_token_id": 2}, {"temperature": None, "do_sample": None}])
def test_nothing_stated_gives_the_model_card_to_belle_and_nobody_else(stated: dict[str, Any]) -> None:
    assert generation_defaults(stated, belle=True) == (BELLE, [])
    assert generation_defaults(stated, belle=False) == (GREEDY, [])
    assert GREEDY.temperature == 0 and GREEDY.repetition_penalty == 1


def test_a_length_alone_is_no_sampling_setting() -> None:
    assert generation_defaults({"max_new_tokens": 64}, belle=True)[0] == replace(BELLE, max_new_tokens=64)
    assert generation_defaults({"max_new_tokens": 64}, belle=False)[0] == replace(GREEDY, max_new_tokens=64)


@pytest.mark.parametrize("belle", [True, False])
def test_settings_are_completed_as_transformers_does(belle: bool) -> None:
    stated = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
    assert generation_defaults(stated, belle=belle) == (GenerationDefaults(256, 0.6, 50, 0.9, 1.0), [])


@pytest.mark.parametrize("do_sample", [None, False])
def test_without_do_sample_answers_are_greedy(do_sample: bool | None) -> None:
    stated = {"do_sample": do_sample, "temperature": 0.7, "top_k": 50, "repetition_penalty": 1.1}
    defaults, notes = generation_defaults(stated, belle=True)
    assert defaults == GenerationDefaults(256, 0.0, 0, 1.0, 1.1)
    how = "without do_sample" if do_sample is None else "with do_sample false"
    assert notes == [f"generation_config.json states temperature 0.7 {how}: answers are greedy, as in Transformers"]


FILES: dict[str, dict[str, Any]] = {
    "ids": {"bos_token_id": 1, "eos_token_id": 2},
    "sampled": {"do_sample": True, "temperature": 0.6, "top_p": 0.9},
    "sampled, with a null": {"do_sample": True, "temperature": None, "top_k": 20},
    "greedy": {"do_sample": False},
    "no do_sample": {"temperature": 0.6, "top_p": 0.9, "top_k": 10},
    "a penalty": {"repetition_penalty": 1.3},
    "a length": {"do_sample": True, "max_new_tokens": 33},
    "made from config.json": {"_from_model_config": True, "do_sample": True, "temperature": 0.5},
}


@pytest.mark.parametrize("place", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("name", FILES)
def test_defaults_equal_those_of_transformers(llama: Path, name: str, place: str) -> None:
    write_json(llama / "tokenizer_config.json", OWN_TEMPLATE)
    write_json(llama / place, (LLAMA_CONFIG if place == "config.json" else {}) | FILES[name])
    model = LlamaForCausalLM.from_pretrained(llama)
    expected, _ = model._prepare_generation_config(None)  # type: ignore[operator]  # what generate() does first
    found = open_checkpoint(llama).generation
    assert found["repetition_penalty"] == expected.repetition_penalty
    sampled = {key: getattr(expected, key) for key in ("temperature", "top_k", "top_p")}
    assert {key: found[key] for key in sampled} == (
        sampled if expected.do_sample else {"temperature": 0, "top_k": 0, "top_p": 1}
    )
    assert found["max_new_tokens"] == (expected.max_new_tokens or 256)


def test_config_json_counts_only_without_a_generation_config(llama: Path) -> None:
    write_json(llama / "config.json", LLAMA_CONFIG | {"do_sample": True, "temperature": 0.9})
    write_json(llama / "tokenizer_config.json", OWN_TEMPLATE)
    assert open_checkpoint(llama).generation["temperature"] == 0.9
    write_json(llama / "generation_config.json", {"eos_token_id": 2})
    assert open_checkpoint(llama).generation["temperature"] == 0


@pytest.mark.parametrize(
    ("template", "temperature"),
    [(None, 0.35), ("belle-bloom", 0.35), ("belle-llama-ext", 0.35), ("raw", 0.0), ("Q: {x} A:", 0.0)],
)
def test_the_model_card_belongs_to_the_templates_of_belle(llama: Path, template: str | None, temperature: float) -> None:
    assert open_checkpoint(llama, template=template).generation["temperature"] == temperature


def test_a_model_with_a_template_of_its_own_has_no_values_of_belle(llama: Path) -> None:
    write_json(llama / "tokenizer_config.json", OWN_TEMPLATE)
    assert GenerationDefaults(**open_checkpoint(llama).generation) == GREEDY


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({"do_sample": True, "min_p": 0.05}, replace(SAMPLING, min_p=0.05)),
        ({"min_new_tokens": 5, "stop_strings": ["Human:", "###"]}, replace(GREEDY, min_tokens=5, stop=("Human:", "###"))),
        ({"do_sample": True, "min_new_tokens": 2.0, "min_p": 0}, replace(SAMPLING, min_tokens=2)),
        ({"stop_strings": "###", "do_sample": False}, replace(GREEDY, stop=("###",))),
        ({"stop_strings": [], "min_new_tokens": 0, "min_p": 0.0}, GREEDY),
    ],
)
def test_settings_that_transformers_names_otherwise(stated: dict[str, Any], expected: GenerationDefaults) -> None:
    assert generation_defaults(stated, belle=False) == (expected, [])


def test_only_sampling_settings_take_belle_s_values_away() -> None:
    stated = {"min_new_tokens": 1, "stop_strings": "x"}
    assert generation_defaults(stated, belle=True)[0] == replace(BELLE, min_tokens=1, stop=("x",))
    defaults, notes = generation_defaults({"min_p": 0.1}, belle=True)
    assert defaults == GREEDY and notes[0].startswith("generation_config.json states min_p 0.1 without do_sample")


NOT_CARRIED = {
    "no_repeat_ngram_size": 3, "num_beams": 4, "suppress_tokens": [7], "min_tokens": 5, "stop": ["x"],
    "typical_p": 0.9, "max_length": 4096, "guidance_scale": 1.5, "chat_format": "chatml", "bad_words_ids": [[5]],
}  # fmt: skip


@pytest.mark.parametrize("key", NOT_CARRIED)
def test_a_setting_that_is_not_carried_is_noted(key: str) -> None:
    shown = json.dumps(NOT_CARRIED[key])
    _, notes = generation_defaults({key: NOT_CARRIED[key]}, belle=True)
    assert notes == [f"settings of generation_config.json that engines do not carry: {key} {shown}"]


def test_settings_that_change_nothing_are_not_noted() -> None:
    neutral = {
        "num_beams": 1, "max_length": 20, "min_length": 0, "typical_p": 1.0, "suppress_tokens": None, "bad_words_ids": None,
        "length_penalty": 1.0, "use_cache": True, "cache_implementation": "static", "transformers_version": "5.23.0",
        "pad_token_id": 0, "output_scores": False, "return_dict_in_generate": False, "num_assistant_tokens": 20,
        "assistant_lookbehind": 10, "_from_model_config": True, "renormalize_logits": True, "early_stopping": False,
    }  # fmt: skip
    assert generation_defaults(neutral, belle=True) == (BELLE, [])


def test_the_defaults_of_transformers_give_no_note() -> None:
    from transformers import GenerationConfig

    defaults = GenerationConfig._get_default_generation_params()
    assert generation_defaults({**defaults, **GenerationConfig().to_dict()}, belle=False) == (GREEDY, [])
    assert generation_defaults(defaults, belle=False) == (GREEDY, [])


def test_notes_reach_the_checkpoint(llama: Path) -> None:
    write_json(llama / "generation_config.json", {"num_beams": 2})
    assert open_checkpoint(llama).notes == ("settings of generation_config.json that engines do not carry: num_beams 2",)


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
        ("min_p", 1.5, r"1.5, expected 0 \(off\) to 1"),
        ("min_new_tokens", -1, r"-1, expected 0 \(off\) or more"),
        ("stop_strings", 5, "5, expected a text, or a list of texts"),
        ("stop_strings", ["a", 5], r"\['a', 5\], expected text, or several"),
        ("stop_strings", [""], r"\[''\], expected a text, or a list of texts"),
    ],
)
def test_values_no_request_may_have_are_refused(key: str, value: object, found: str) -> None:
    message = rf"^checkpoint: key {key} of generation_config\.json: found {found}; correct the file or remove the key\.$"
    with pytest.raises(CompileError, match=message):
        generation_defaults({key: value}, belle=False)


# Changes that a user asks for


def test_changes_apply_in_their_order(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    write_json(file, {"do_sample": True, "top_p": 0.9, "num_beams": 2})
    defaults, notes = changed_defaults(BELLE, ["top_k=5", str(file), "temperature=0.5", "max_new_tokens=64"])
    assert defaults == GenerationDefaults(64, 0.5, 50, 0.9, 1.0)
    assert notes == ["settings of mine.json that engines do not carry: num_beams 2"]
    assert changed_defaults(BELLE, ["top_k=5"]) == (replace(BELLE, top_k=5), [])
    several = ["min_p=0.2", "min_new_tokens=3", 'stop=["a", "b"]']
    assert changed_defaults(BELLE, several) == (replace(BELLE, min_p=0.2, min_tokens=3, stop=("a", "b")), [])
    assert changed_defaults(BELLE, ["stop=Human:"])[0].stop == ("Human:",)
    assert changed_defaults(replace(BELLE, stop=("a",)), ["stop="])[0].stop == ()
    assert changed_defaults(BELLE, []) == (BELLE, [])


def test_a_file_whose_name_has_an_equals_sign(tmp_path: Path) -> None:
    write_json(tmp_path / "top_p=0.5.json", {"do_sample": True})
    assert changed_defaults(BELLE, [str(tmp_path / "top_p=0.5.json")])[0] == GenerationDefaults(256, 1.0, 50, 1.0, 1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "heat=1",
            "--generation-defaults heat=1: found the key 'heat', expected one of max_new_tokens, temperature, top_k, top_p",
        ),
        ("temperature=hot", "--generation-defaults temperature=hot: found 'hot', expected a number"),
        ("top_p=2", "--generation-defaults top_p=2: found 2, expected above 0 and at most 1"),
        ("top_k=1.5", "found 1.5, expected a whole number"),
        ("max_new_tokens=", "found '', expected a whole number"),
        ("missing.json", "file missing.json: found .*No such file"),
    ],
)
def test_changes_that_cannot_be_made(change: str, message: str) -> None:
    with pytest.raises(CompileError, match=message):
        changed_defaults(BELLE, [change])


def test_changes_at_a_build_outrank_the_checkpoint(llama: Path) -> None:
    write_json(llama / "generation_config.json", {"do_sample": True, "temperature": 0.6})
    assert open_checkpoint(llama, generation=["temperature=0"]).generation["temperature"] == 0
