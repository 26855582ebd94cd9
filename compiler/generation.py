"""Generation defaults: the meaning of a generation_config.json, the values of BELLE's model card, and changes to them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.json_files import read_json
from belle_compile.compiler.places import CHECKPOINT_STAGE as STAGE
from belle_compile.runtime.artifact import GenerationDefaults
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.serving.request import SamplingParams

# https://huggingface.co/BelleGroup/BELLE-7B-2M, "Use model"
BELLE = GenerationDefaults(max_new_tokens=200, temperature=0.35, top_k=30, top_p=0.85, repetition_penalty=1.2)
GREEDY = GenerationDefaults()
# What Transformers samples with where a setting is left out (GenerationConfig._get_default_generation_params).
SAMPLING = replace(GREEDY, temperature=1.0, top_k=50)
CARRIED = tuple(field.name for field in fields(GenerationDefaults))
# Names that Transformers has for some.
_NAMES = {"min_new_tokens": "min_tokens", "stop_strings": "stop"}
_FIELDS: Mapping[str, str] = {name: name for name in CARRIED if name not in _NAMES.values()} | _NAMES
_OF_GREEDY = ("max_new_tokens", "min_tokens", "stop")  # settings of greedy and of sampled answers
_OPTION = "--generation-defaults"

# Settings that engines do not carry, with the values at which they change nothing; null changes nothing in any of them.
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "max_length": (20,),  # Transformers' default; it counts the prompt too
    "min_length": (0,),
    "early_stopping": (False,),
    "max_time": (),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0.0,),
    "top_h": (),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "encoder_repetition_penalty": (1.0,),
    "length_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "bad_words_ids": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": ({}, []),
    "token_healing": (False,),
    "guidance_scale": (1.0,),
    "watermarking_config": (),
    "num_return_sequences": (1,),
    "penalty_alpha": (0.0,),
    "dola_layers": (),
    "constraints": ([],),
    "force_words_ids": ([],),
}
# Settings that change no answer or are read elsewhere: ids, caches, outputs, ways to compute the same faster, bookkeeping.
_NO_SETTING = re.compile(
    r"do_sample|(bos|eos|pad|decoder_start)_token_id|.*cache.*|output_.*|return_.*|.*compile.*|assistant_.*|is_assistant"
    r"|num_assistant_.*|prompt_lookup_.*|max_matching_ngram_size|target_lookbehind|speculation_type|use_mtp|low_memory"
    r"|renormalize_logits|remove_invalid_values|prefill_chunk_size|continuous_batching_config|transformers_version"
    r"|_from_model_config|_commit_hash|_original_object_hash|trust_remote_code"
)


def settings_of_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The generation settings in a config.json, which count where there is no generation_config.json."""
    return {key: value for key, value in config.items() if key in _FIELDS or key in NEUTRAL or key == "do_sample"}


def generation_defaults(
    stated: Mapping[str, Any], *, belle: bool, source: str = "generation_config.json"
) -> tuple[GenerationDefaults, list[str]]:
    """Return the defaults that `stated`, the content of the file `source`, asks for, and notes on what is not carried.

    As in Transformers, answers are sampled only if do_sample is true, with the settings that Transformers has where one is left
    out, and greedy otherwise; the repetition penalty applies to both. Without any sampling setting, as in BELLE's releases,
    which hold token ids only, the defaults are the model card's for BELLE's prompt templates (`belle`), else greedy. Raises
    CompileError for a value that `SamplingParams` refuses.
    """
    given = {
        key: _checked(key, value, f"key {name} of {source}")
        for name, key in _FIELDS.items()
        if (value := stated.get(name)) is not None
    }
    settings = [key for key in given if key not in _OF_GREEDY]
    do_sample = stated.get("do_sample")
    notes = _not_carried(stated, source)
    if belle and do_sample is None and not settings:
        return replace(BELLE, **given), notes
    if do_sample is True:
        return replace(SAMPLING, **given), notes
    greedy = {key: given[key] for key in (*_OF_GREEDY, "repetition_penalty") if key in given}
    if unused := [key for key in settings if key not in greedy and given[key] != getattr(SAMPLING, key)]:
        without = "with do_sample false" if do_sample is False else "without do_sample"
        notes.append(f"{source} states {_listed(given, unused)} {without}: answers are greedy, as in Transformers")
    return replace(GREEDY, **greedy), notes


def generation_config(defaults: GenerationDefaults) -> dict[str, Any]:
    """The settings of a generation_config.json that state these defaults, without those that are off."""
    names = {field: name for name, field in _FIELDS.items()}
    sampled = defaults.temperature > 0
    stated = [key for key in CARRIED if sampled or key in (*_OF_GREEDY, "repetition_penalty")]
    off = [key for key in ("min_p", "min_tokens", "stop") if getattr(defaults, key) == getattr(GREEDY, key)]
    values = {names[key]: getattr(defaults, key) for key in stated if key not in off}
    settings = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    return {"do_sample": sampled} | settings


def changed_defaults(defaults: GenerationDefaults, changes: Sequence[str]) -> tuple[GenerationDefaults, list[str]]:
    """Apply the values of --generation-defaults in their order; returns the new defaults and notes on what is not carried.

    A value is KEY=VALUE, which changes one setting, or the path of a file in the form of generation_config.json, which replaces
    all. Raises CompileError for anything else.
    """
    notes: list[str] = []
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals or Path(change).is_file():
            defaults, of_file = generation_defaults(read_json(Path(change)), belle=False, source=Path(change).name)
            notes += of_file
        elif (key := _NAMES.get(key, key)) in CARRIED:
            defaults = replace(defaults, **{key: _checked(key, _parsed(value), f"{_OPTION} {change}")})
        else:
            raise CompileError(STAGE, f"{_OPTION} {change}", found=f"the key {key!r}", expected=f"one of {', '.join(CARRIED)}")
    return defaults, notes


def _not_carried(stated: Mapping[str, Any], source: str) -> list[str]:
    rest = [
        key
        for key, value in stated.items()
        if value is not None and key not in _FIELDS and not _NO_SETTING.fullmatch(key) and value not in NEUTRAL.get(key, ())
    ]
    return [f"settings of {source} that engines do not carry: {_listed(stated, rest)}"] if rest else []


def _listed(values: Mapping[str, Any], keys: Sequence[str]) -> str:
    return ", ".join(f"{key} {_short(json.dumps(values[key], ensure_ascii=False))}" for key in keys)


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _texts(value: Any) -> Any:
    """What `SamplingParams` takes for the text or list of texts that a file states."""
    return value if isinstance(value, str) and value else tuple(value)


def _checked(key: str, value: Any, what: str) -> Any:
    """The value of a setting, in the type of the manifest's field; `what` names it in errors."""
    default = getattr(BELLE, key)
    expected = {int: "a whole number", float: "a number", tuple: "a text, or a list of texts"}[type(default)]
    try:
        if isinstance(default, tuple):
            if isinstance(value, (str, list)):
                return SamplingParams(stop=_texts(value)).stop
        elif type(value) in (int, float) and (isinstance(default, float) or float(value).is_integer()):
            SamplingParams(**{key: value})
            return type(default)(value)
    except EngineError as error:
        expected = error.expected or expected
    remedy = "" if what.startswith(_OPTION) else "correct the file or remove the key"
    raise CompileError(STAGE, what, found=repr(value), expected=expected, remedy=remedy)
