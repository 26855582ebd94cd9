"""Adapters that cannot be merged: each ends in one sentence that says why, and what to do."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoHaConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model

from belle_compile.compiler.checkpoint import open_checkpoint
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.reading import AdapterChoice, Reading
from belle_compile.runtime.adapters.targets import matching
from belle_compile.runtime.errors import EngineError
from tests.compiler.checkpoint.models import write_json
from tests.compiler.checkpoint.overlays.adapters import edit_config, edit_tensors, make_adapter
from tests.parity.variants import VARIANTS, load_hf

Tensors = dict[str, torch.Tensor]
Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: VARIANTS[name](tmp_path_factory.mktemp(name)) for name in ("bloom", "llama", "llama_gqa", "llama_tied")}


@pytest.fixture(scope="module")
def plain(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the llama base, to be copied and damaged."""
    folder = tmp_path_factory.mktemp("adapters") / "plain"
    return make_adapter(bases["llama"], folder, target_modules=["q_proj", "v_proj"])


def refused(base: Path, adapter: Path, message: str, scale: float = 1.0) -> None:
    with pytest.raises(CompileError, match=message) as caught:
        open_checkpoint(base, reading=Reading(adapters=(AdapterChoice(str(adapter), scale),)))
    assert "\n" not in str(caught.value)


# Changes to adapter_config.json, and the sentence.
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "method": ({"peft_type": "ADALORA"}, r"adapter .*: found an adapter of ADALORA, expected a LoRA adapter; merge"),
    "no_method": ({"peft_type": None}, r"found no peft_type, expected a LoRA adapter"),
    "task": ({"task_type": "SEQ_CLS"}, r"found an adapter for the task SEQ_CLS, expected an adapter for text generation"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, r"begun with pissa_niter_4, .*; save it with .*path_initial_model"),
    "olora": ({"init_lora_weights": "olora"}, r"begun with olora, which is one of other weights than its base has"),
    "alora": ({"alora_invocation_tokens": [1]}, r"key alora_invocation_tokens of adapter_config\.json: found activated LoRA"),
    "qalora": ({"use_qalora": True}, r"found QA-LoRA, expected plain LoRA, rank-stabilized LoRA or DoRA; merge it with"),
    "kasa": ({"kasa_config": {"beta": 1}}, r"found KaSA, which changes the weights of the base"),
    "replication": ({"layer_replication": [[0, 2]]}, r"found replicated layers"),
    "parameters": ({"target_parameters": ["experts"]}, r"found changes of parameters that are no modules"),
    "old_parts": ({"enable_lora": [True, False, True]}, r"found LoRA on parts of a fused layer, as PEFT 0\.2 wrote it"),
    "unknown": ({"use_new": 3}, r"key use_new of adapter_config\.json: found 3, expected a key this compiler knows; remove"),
    "rank": ({"r": 3}, r"q_proj\.lora_A\.weight of adapter .*: found shape \[4, 64\], expected \[3, 64\], by the base"),
    "rank_text": ({"r": "x"}, r"key r of adapter_config\.json: found 'x', expected a whole number >= 1"),
    "alpha": ({"lora_alpha": -1}, r"key lora_alpha of adapter_config\.json: found -1, expected a number > 0"),
    "pattern": ({"rank_pattern": {"q_proj": "4"}}, r"key rank_pattern .* expected an object of positive numbers"),
    "expression": ({"target_modules": "(q_proj"}, r"regular expression '\(q_proj': found .*, expected one that matches names"),
    "layers": (
        {"target_modules": ".*q_proj", "layers_to_transform": 1}, r"key layers_to_transform .* found layers beside a regular"
    ),
    "targets": ({"target_modules": 3}, r"key target_modules of adapter_config\.json: found 3, expected names of modules"),
    "untargeted": (
        {"target_modules": ["q_proj"]},
        r"found changes of model\.layers\.0\.self_attn\.v_proj, .*expected only modules that target_modules .* names; correct",
    ),
    "lacking": (
        {"target_modules": ["q_proj", "v_proj", "up_proj"]},
        r"found no changes of model\.layers\.0\.mlp\.up_proj, model\.layers\.1\.mlp\.up_proj, expected those of all modules",
    ),
    "no_magnitudes": ({"use_dora": True}, r"found no lora_magnitude_vector of model\.layers\.0\.self_attn\.q_proj"),
    "saved": ({"modules_to_save": ["lm_head"]}, r"found no tensor lm_head\.weight, expected those of modules_to_save"),
    "tokens": ({"trainable_token_indices": [3]}, r"found no rows of the embedding, expected those that adapter_config\.json"),
    "tokens_twice": ({"trainable_token_indices": [3, 3]}, r"found a token twice"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config(case: str, bases: dict[str, Path], plain: Path, tmp_path: Path) -> None:
    changes, message = CONFIGS[case]
    adapter = edit_config(Path(shutil.copytree(plain, tmp_path / "adapter")), **changes)
    refused(bases["llama"], adapter, message)


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key.replace(old, new): tensor for key, tensor in tensors.items()}


def added(name: str, *shape: int) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {f"base_model.model.{name}": torch.zeros(shape)}


TENSORS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "half": (without(f"{Q}.lora_B.weight"), r"found no lora_B\.weight of model\.layers\.0\.self_attn\.q_proj"),
    "empty": (lambda tensors: {}, r"weights .*: found no tensors, as of a script that saved .*; save the adapter again"),
    "no_prefix": (renamed("base_model.model.", ""), r"expected a name that begins with base_model\.model\., as PEFT"),
    "adapter_name": (renamed("lora_A.weight", "lora_A.default.weight"), r"found .*lora_A\.default\.weight, expected the"),
    "other_modules": (
        renamed("model.layers.0.self_attn", "transformer.h.0.attn"),
        r"found changes of transformer\.h\.0\.attn\.q_proj, expected changes of modules that the base has; it belongs",
    ),
    "more_layers": (renamed("layers.1", "layers.7"), r"found changes of model\.layers\.7\.self_attn\.q_proj, expected"),
    "other_tensor": (added("score.weight", 2, 64), r"found a tensor score\.weight, expected tensors that the base has"),
    "other_width": (added("model.norm.weight", 65), r"model\.norm\.weight of adapter .*: found shape \[65\], expected \[64\]"),
    "other_columns": (added("lm_head.weight", 311, 60), r"lm_head\.weight .*: found shape \[311, 60\], expected \[311, 64\]"),
    "one_table": (added("lm_head.weight", 320, 64), r"found an embedding of 311 rows and a head of 320, expected both"),
    "bias": (added("model.layers.0.self_attn.q_proj.lora_B.bias", 64), r"found lora_B\.bias of .*, expected lora_A\.weight"),
    "integers": (
        lambda tensors: {name: tensor.to(torch.int32) for name, tensor in tensors.items()},
        r"found dtype int32, expected float32, float16 or bfloat16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSORS)
def test_tensors(case: str, bases: dict[str, Path], plain: Path, tmp_path: Path) -> None:
    change, message = TENSORS[case]
    adapter = edit_tensors(Path(shutil.copytree(plain, tmp_path / "adapter")), change)
    refused(bases["llama"], adapter, message)


def test_an_adapter_of_another_base(bases: dict[str, Path], plain: Path) -> None:
    refused(bases["bloom"], plain, r"adapter .*/plain: found changes of model\.layers\.0\.self_attn\.q_proj, expected changes")
    refused(bases["llama_tied"], plain, r"found shape \[4, 64\], expected \[4, 40\], by the base and .*; it belongs to another")
    # Three layers in place of two.
    refused(bases["llama_gqa"], plain, r"found no changes of model\.layers\.2\.self_attn\.q_proj, model\.layers\.2\.self_attn")


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        LoHaConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ],
    ids=lambda config: str(config.peft_type.value),
)
def test_other_methods_are_named(config: Any, bases: dict[str, Path], tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(load_hf(bases["llama"]), config).save_pretrained(str(tmp_path))
    refused(bases["llama"], tmp_path, rf"found an adapter of {config.peft_type.value}, expected a LoRA adapter")


def test_a_bias_that_the_base_has_no_place_for(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = make_adapter(bases["llama"], tmp_path / "adapter", target_modules=["q_proj"], lora_bias=True)
    refused(bases["llama"], adapter, r"found a bias for model\.layers\.0\.self_attn\.q_proj \(lora_bias\), expected biases for")


def test_tokens_that_the_base_does_not_have(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = make_adapter(bases["llama"], tmp_path / "adapter", target_modules=["q_proj"], trainable_token_indices=[3, 4])
    refused(bases["llama"], edit_config(adapter, trainable_token_indices=[3, 311]), r"found row 311 of .*, expected one of")
    refused(bases["llama"], edit_config(adapter, trainable_token_indices=[3]), r"found shape \[2, 64\], expected \[1, 64\]")


def test_a_tied_head_with_other_changes_than_the_embedding(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    adapter = make_adapter(bases["llama_tied"], folder, target_modules=["embed_tokens"], ensure_weight_tying=True)
    name = "base_model.model.lm_head.lora_A.weight"
    edit_tensors(adapter, lambda tensors: tensors | {name: tensors[name] + 1})
    refused(bases["llama_tied"], adapter, r"found other changes of lm_head than of model\.embed_tokens, expected the same, by")


def test_directories_that_are_no_adapters(bases: dict[str, Path], plain: Path, tmp_path: Path) -> None:
    refused(
        bases["llama"], bases["bloom"], r"found a directory without adapter_config\.json, expected an adapter of PEFT; give the"
    )
    refused(bases["llama"], plain / "adapter_config.json", r"found a file, expected an adapter of PEFT; give the directory")
    write_json(tmp_path / "adapter_config.json", {"peft_type": "LORA"})
    refused(bases["llama"], tmp_path, r"found no weights, expected adapter_model\.safetensors or adapter_model\.bin")
    (tmp_path / "adapter_config.json").write_text("{")
    refused(bases["llama"], tmp_path, r"adapter_config\.json: found text that is not JSON")


def test_an_adapter_in_the_place_of_a_model(plain: Path) -> None:
    message = r"found a LoRA adapter without the model that it changes, expected a model; belle-compile build \S+ --adapter"
    with pytest.raises(CompileError, match=message) as caught:
        open_checkpoint(plain)
    assert str(caught.value).endswith(f" --adapter {plain}.")


def test_expressions_that_take_forever_are_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("belle_compile.runtime.adapters.targets.MOST_SECONDS", 0.5)
    with pytest.raises(EngineError, match=r"regular expression .*: found one that takes more than 0\.5 seconds, expected"):
        matching(r"(\w+\.?)+\d", ["model.layers.self_attn.q_proj_and_some_more_words_x"])
