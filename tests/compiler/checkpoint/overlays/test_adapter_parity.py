"""Merged adapters against the logits of PEFT, for every feature of LoRA on BLOOM and LLaMA."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from belle_compile.compiler.checkpoint import open_checkpoint
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.families import build_graph
from belle_compile.compiler.reading import AdapterChoice, Reading
from tests.compiler.checkpoint.formats.test_gguf import write_gguf
from tests.compiler.checkpoint.models import write_json
from tests.compiler.checkpoint.overlays.adapters import QKV, Floats, edit_config, edit_tensors, make_adapter, peft_logits
from tests.parity.stepping import Stepper, relative_error
from tests.parity.variants import VARIANTS, hf_logits, random_ids

TOLERANCE = 1e-5  # of the largest logit: the sums are in another order
PROMPT = 12

# Name -> (variant of the base, config of the adapter).
FEATURES: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("bloom", {"r": 16, "lora_alpha": 32, "target_modules": QKV["bloom"]}),
    "llama": ("llama", {"r": 16, "lora_alpha": 32, "target_modules": QKV["llama"]}),
    "llama_gqa": ("llama_gqa", {"target_modules": ["q_proj", "k_proj", "v_proj"]}),
    "rslora": ("llama", {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "rank_pattern": {"v_proj": 8, r"layers\.1\.(self_attn|mlp)\.(q|up)_proj": 2},
            "alpha_pattern": {"layers.0.self_attn.q_proj": 20, "^model.*up_proj": 3},
        },
    ),
    "rslora_patterns": (
        "llama",
        {"target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"v_proj": 8}, "alpha_pattern": {"q_proj": 1}},
    ),
    "dora": ("llama", {"target_modules": QKV["llama"], "use_dora": True}),
    "dora_bloom": ("bloom", {"target_modules": ["query_key_value", "dense"], "use_dora": True}),
    "dora_embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    "regular_expression": ("llama", {"target_modules": r".*layers\.\d+\.(self_attn\.[qk]_proj|mlp\.up_proj)"}),
    "all_linear": ("llama", {"target_modules": "all-linear"}),
    "all_linear_bloom": ("bloom", {"target_modules": "all-linear"}),
    "excluded": ("llama", {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*layers\.0\..*v_proj"}),
    "some_layers": ("llama_gqa", {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]}),
    "layers_by_name": ("bloom", {"target_modules": ["dense"], "layers_to_transform": 1, "layers_pattern": "h"}),
    "head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied_embedding": ("bloom", {"target_modules": ["word_embeddings", "query_key_value"]}),
    "tied_head": ("llama_tied", {"target_modules": ["lm_head", "q_proj"]}),
    "tied_both": ("llama_tied", {"target_modules": ["lm_head", "embed_tokens"]}),
    "tied_together": ("llama_tied", {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}),
    "tied_together_dora": ("llama_tied", {"target_modules": ["embed_tokens"], "ensure_weight_tying": True, "use_dora": True}),
    "saved": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "norm"]}),
    "saved_part": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["layers.1.mlp"]}),
    "saved_tied_embedding": ("llama_tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "saved_tied_head": ("bloom", {"target_modules": ["query_key_value"], "modules_to_save": ["lm_head"]}),
    "saved_tied_both": ("llama_tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "saved_tied_together": (
        "llama_tied",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "biases": ("bloom", {"target_modules": ["query_key_value"], "bias": "all"}),
    "biases_of_lora": ("bloom", {"target_modules": ["query_key_value", "dense"], "bias": "lora_only"}),
    "biases_of_llama": ("llama_biases", {"target_modules": ["q_proj"], "bias": "all"}),
    "lora_bias": ("bloom", {"target_modules": ["query_key_value"], "lora_bias": True}),
    "tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [5, 300, 7]}),
    "tokens_tied": ("llama_tied", {"target_modules": ["q_proj"], "trainable_token_indices": [5, 300, 7]}),
    "tokens_of_both": (
        "llama",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [2, 3]}},
    ),
    "tokens_tied_apart": (
        "llama_tied",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [2, 3]}},
    ),
    "tokens_tied_alike": (
        "llama_tied",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [1, 2]}},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The checkpoints that the features change, each made once."""
    names = {variant for variant, _ in FEATURES.values()}
    return {name: VARIANTS[name](tmp_path_factory.mktemp(name)) for name in sorted(names)}


def logits_of(base: Path, reading: Reading, ids: list[int]) -> Floats:
    return Stepper(build_graph(open_checkpoint(base, reading=reading))).step({0: ids})[0]


def merged(*adapters: tuple[Path, float]) -> Reading:
    return Reading(adapters=tuple(AdapterChoice(str(directory), scale) for directory, scale in adapters))


@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_gives_the_logits_of_peft(feature: str, bases: dict[str, Path], tmp_path: Path) -> None:
    variant, config = FEATURES[feature]
    base, adapter = bases[variant], make_adapter(bases[variant], tmp_path / "adapter", **config)
    ids = [*random_ids(base, PROMPT), 5, 300, 7, 1, 2, 3]
    expected = peft_logits(base, [(adapter, 0.5)], ids)
    assert relative_error(logits_of(base, merged((adapter, 0.5)), ids), expected) < TOLERANCE
    assert relative_error(hf_logits(base, ids), expected) > 100 * TOLERANCE, "the adapter changes something"


def test_adapters_are_merged_in_turn(bases: dict[str, Path], tmp_path: Path) -> None:
    """The magnitudes of the second belong to the model that the first one made."""
    base, first, second = bases["llama"], tmp_path / "first", tmp_path / "second"
    make_adapter(base, first, target_modules=["q_proj", "up_proj"])
    make_adapter(base, second, seed=1, target_modules=["q_proj", "v_proj"], use_dora=True)
    ids = random_ids(base, PROMPT)
    found = []
    for order in ([(first, 1.0), (second, 0.7)], [(second, 0.7), (first, 1.0)]):
        found.append(logits_of(base, merged(*order), ids))
        assert relative_error(found[-1], peft_logits(base, order, ids)) < TOLERANCE
    assert relative_error(*found) > 100 * TOLERANCE


def test_an_adapter_as_belle_published_them(bases: dict[str, Path], tmp_path: Path) -> None:
    """PEFT 0.2 wrote other keys and a pickle, and the script moved it to another place."""
    base = bases["bloom"]
    adapter = make_adapter(base, tmp_path / "adapter", r=16, lora_alpha=32, target_modules=["query_key_value"])
    config = {
        "base_model_name_or_path": "bigscience/bloomz-7b1-mt", "bias": "none", "enable_lora": None, "fan_in_fan_out": False,
        "inference_mode": True, "lora_alpha": 32, "lora_dropout": 0.05, "merge_weights": False, "modules_to_save": None,
        "peft_type": "LORA", "r": 16, "target_modules": ["query_key_value"], "task_type": "CAUSAL_LM",
    }  # fmt: skip
    write_json(adapter / "adapter_config.json", config)
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    ids = random_ids(base, PROMPT)
    expected = peft_logits(base, [(adapter, 1.0)], ids)
    assert relative_error(logits_of(base, merged((adapter, 1.0)), ids), expected) < TOLERANCE


def test_what_peft_corrects_when_it_loads(bases: dict[str, Path], tmp_path: Path) -> None:
    base, adapter = bases["bloom"], make_adapter(bases["bloom"], tmp_path / "adapter", target_modules=["dense"], use_dora=True)
    edit_config(adapter, fan_in_fan_out=True)
    edit_tensors(adapter, lambda tensors: {name.replace("_vector", "_vector.weight"): each for name, each in tensors.items()})
    ids = random_ids(base, PROMPT)
    expected = peft_logits(base, [(adapter, 1.0)], ids)
    assert relative_error(logits_of(base, merged((adapter, 1.0)), ids), expected) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_in_16_bits(dtype: torch.dtype, bases: dict[str, Path], tmp_path: Path) -> None:
    base, adapter = bases["bloom"], make_adapter(bases["bloom"], tmp_path / "adapter", target_modules=["query_key_value"])
    edit_tensors(adapter, lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})
    ids = random_ids(base, PROMPT)
    expected = peft_logits(base, [(adapter, 1.0)], ids)
    assert relative_error(logits_of(base, merged((adapter, 1.0)), ids), expected) < TOLERANCE


@pytest.mark.parametrize(
    ("variant", "config"),
    [
        ("llama", {"modules_to_save": ["embed_tokens", "lm_head"]}),
        ("llama", {}),  # PEFT saves resized tables by itself
        ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
        ("llama", {"trainable_token_indices": [311, 319]}),
        ("llama_tied", {}),
        ("llama_tied", {"target_modules": ["embed_tokens"]}),
        ("llama_tied", {"trainable_token_indices": [311, 319]}),
        ("llama_tied", {"modules_to_save": ["embed_tokens"]}),
        ("llama_tied", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    ],
)
def test_a_vocabulary_that_was_resized(variant: str, config: dict[str, Any], bases: dict[str, Path], tmp_path: Path) -> None:
    base, rows = bases[variant], 320
    adapter = make_adapter(base, tmp_path / "adapter", rows=rows, **{"target_modules": ["q_proj"], **config})
    ids = [*random_ids(base, PROMPT), 311, 319]
    opened = open_checkpoint(base, reading=merged((adapter, 1.0)))
    assert opened.config["vocab_size"] == rows
    assert (
        "adapter adapter changes the vocabulary to 320 rows, with the tokenizer of the base, since it has none" in opened.notes
    )
    found = Stepper(build_graph(opened)).step({0: ids})[0]
    assert relative_error(found, peft_logits(base, [(adapter, 1.0)], ids, rows)) < TOLERANCE


def test_a_resized_vocabulary_comes_with_its_tokenizer_and_template(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["llama"]
    adapter = make_adapter(base, tmp_path / "adapter", rows=320, target_modules=["q_proj"])
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<|user|>", "<|assistant|>"])
    tokenizer.chat_template = "{% for m in messages %}<|user|>{{ m['content'] }}<|assistant|>{% endfor %}"
    tokenizer.save_pretrained(adapter)
    opened = open_checkpoint(base, reading=merged((adapter, 1.0)))
    ids = Tokenizer.from_str(opened.tokenizer_json).encode("<|user|>hello<|assistant|>", add_special_tokens=False).ids
    assert ids == tokenizer.encode("<|user|>hello<|assistant|>", add_special_tokens=False) and max(ids) < 320
    assert opened.template.jinja == tokenizer.chat_template
    assert not [note for note in opened.notes if "unusable" in note]
    assert {"adapter/tokenizer.json", "adapter_model.safetensors", "adapter_config.json"} <= opened.digests().keys()


def test_what_was_done_stands_in_the_notes(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["bloom"]
    adapter = make_adapter(base, tmp_path / "chat", target_modules=["query_key_value", "word_embeddings"])
    edit_config(adapter, base_model_name_or_path="BelleGroup/BELLE-7B-2M", fan_in_fan_out=True)
    (adapter / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    plain, opened = open_checkpoint(base), open_checkpoint(base, reading=merged((adapter, 0.5)))
    assert opened.notes == (
        *plain.notes,
        "adapter chat was merged, its changes of low rank multiplied by 0.5: LoRA of rank 4 in 3 modules "
        "(query_key_value, word_embeddings)",
        "the head is a table of its own, since adapter chat changes it or the embedding alone",
        "adapter chat was trained on BELLE-7B-2M, by its adapter_config.json; its shapes and names fit this model",
        "fan_in_fan_out of adapter chat is for layers with transposed weights, and was passed over",
        "adapter chat has another prompt template, chat_template.jinja, than the one used, belle-bloom: --template chooses one",
    )
    assert opened.config["tie_word_embeddings"] is False and plain.config.get("tie_word_embeddings") is not False
    assert opened.tensors["h.0.self_attention.query_key_value.weight"].describe() == (
        "adapter chat <- model.safetensors: transformer.h.0.self_attention.query_key_value.weight"
    )
    assert opened.digests().keys() == {*plain.digests(), "adapter_config.json", "adapter_model.safetensors"}


def test_the_base_by_its_own_name_needs_no_note(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = make_adapter(bases["llama"], tmp_path / "adapter", target_modules=["q_proj"])
    (moved := tmp_path / "elsewhere" / "BELLE-LLaMA-7B").parent.mkdir()
    moved.symlink_to(bases["llama"])
    edit_config(adapter, base_model_name_or_path="/old/place/BELLE-LLaMA-7B/")
    assert not [note for note in open_checkpoint(moved, reading=merged((adapter, 1.0))).notes if "trained on" in note]


def test_an_adapter_beside_its_base_is_merged_on_request(bases: dict[str, Path], tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(bases["llama"], model)
    make_adapter(bases["llama"], model, target_modules=["q_proj"])
    ids = random_ids(model, PROMPT)
    expected = peft_logits(bases["llama"], [(model, 1.0)], ids)
    assert relative_error(logits_of(model, merged((model, 1.0)), ids), expected) < TOLERANCE
    with pytest.raises(CompileError, match=r"pass --adapter .*/model to merge the adapter, or --ignore-adapter"):
        open_checkpoint(model)


def test_integers_of_a_gguf_base_become_floats(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", kind="Q8_0")
    name, module = "model.layers.0.mlp.up_proj.weight", "base_model.model.model.layers.0.mlp.up_proj"
    plain = open_checkpoint(tmp_path / "m.gguf")
    outputs, inputs = plain.tensors[name].shape
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    a, b = torch.randn(3, inputs), torch.randn(outputs, 3)
    save_file({f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}, adapter / "adapter_model.safetensors")
    write_json(adapter / "adapter_config.json", {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["up_proj"]})
    opened = open_checkpoint(tmp_path / "m.gguf", reading=merged((adapter, 1.0)))
    expected = plain.tensors[name].read() + 2 * (b @ a).numpy()
    np.testing.assert_allclose(opened.tensors[name].read(), expected, rtol=1e-5, atol=1e-6)
    assert plain.tensors[name].quantized is not None and opened.tensors[name].quantized is None
    assert opened.tensors["lm_head.weight"].quantized is not None
