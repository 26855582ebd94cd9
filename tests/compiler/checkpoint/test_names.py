"""Names that wrappers change, and tensors that Transformers ignores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from belle_compile.compiler.checkpoint import open_checkpoint
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.families import build_graph
from tests.compiler.checkpoint.models import LLAMA_CONFIG, llama_tensors, write_json, write_small_files, write_weights


def with_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    write_weights(write_small_files(folder, LLAMA_CONFIG) / "model.safetensors", tensors)
    return folder


@pytest.mark.parametrize(
    ("prefix", "words"),
    [
        ("base_model.model.", r"the prefix base_model\.model\. of PEFT, .*; merge the adapter \(merge_and_unload\)"),
        ("module.", r"the prefix module\. of DistributedDataParallel or DeepSpeed, .*; unwrap the model before saving it"),
        ("_orig_mod.", r"the prefix _orig_mod\. of torch\.compile, .*; save model\._orig_mod in place"),
        ("_fsdp_wrapped_module.", r"the prefix _fsdp_wrapped_module\. of FSDP"),
        ("_forward_module.", r"the prefix _forward_module\. of Lightning or DeepSpeed"),
        ("pretrained_model.", r"the prefix pretrained_model\. of TRL"),
        ("module._orig_mod.", r"the part _orig_mod\. of torch\.compile"),
    ],
)
def test_prefixes_of_wrappers_are_named(tmp_path: Path, prefix: str, words: str) -> None:
    folder = with_tensors(tmp_path, {prefix + name: tensor for name, tensor in llama_tensors().items()})
    with pytest.raises(CompileError, match=f"found {words}"):
        open_checkpoint(folder)


def test_a_wrapper_around_inner_modules(tmp_path: Path) -> None:
    tensors = {name.replace("layers.0.", "layers.0._orig_mod."): tensor for name, tensor in llama_tensors().items()}
    with pytest.raises(CompileError, match=r"tensor model\.layers\.0\._orig_mod\..*: found the part _orig_mod\. of torch"):
        open_checkpoint(with_tensors(tmp_path, tensors))


@pytest.mark.parametrize("part", ["base_layer", "lora_A.default", "lora_B.default", "modules_to_save.default"])
def test_an_adapter_that_was_not_merged(tmp_path: Path, part: str) -> None:
    tensors = llama_tensors() | {f"model.layers.0.self_attn.q_proj.{part}.weight": torch.ones(8, 32)}
    words = rf"q_proj\.{part}\.weight in .*: found the part {part.split('.')[0]}\. of PEFT, .*; merge the adapter"
    with pytest.raises(CompileError, match=words):
        open_checkpoint(with_tensors(tmp_path, tensors))


def test_an_unknown_prefix_is_seen_in_near_names(tmp_path: Path) -> None:
    tensors = {f"llm.{name}": tensor for name, tensor in llama_tensors().items()}
    with pytest.raises(CompileError) as caught:
        build_graph(open_checkpoint(with_tensors(tmp_path, tensors)))
    message = str(caught.value)
    assert "near names: llm.model.embed_tokens.weight" in message and "tie_word_embeddings" not in message


IGNORED = {
    "v_head.summary.weight": torch.ones(1, 32),
    "v_head.summary.bias": torch.ones(1),
    "score.weight": torch.ones(2, 32),
    "model.layers.0.self_attn.rotary_emb.cos_cached": torch.ones(16, 8),
    "model.layers.0.self_attn.rotary_emb.sin_cached": torch.ones(1, 1, 16, 8),
    "model.position_ids": torch.arange(16)[None],
    "model.causal_mask": torch.ones(4, 4, dtype=torch.bool),
    "model.tokens_seen": torch.tensor(7),
    "model.layers.0.attention.bias": torch.ones(4, 4, dtype=torch.uint8),
}


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_what_transformers_ignores_is_ignored_and_noted(tmp_path: Path, suffix: str) -> None:
    folder = write_small_files(tmp_path, LLAMA_CONFIG)
    write_weights(folder / ("model.safetensors" if suffix == "safetensors" else "pytorch_model.bin"), llama_tensors() | IGNORED)
    checkpoint = open_checkpoint(folder)
    build_graph(checkpoint)
    loaded = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert checkpoint.tensors.keys() == loaded.keys()
    for name, tensor in loaded.items():
        np.testing.assert_array_equal(checkpoint.tensors[name].read(), tensor.numpy())
    (note,) = checkpoint.notes
    assert note.startswith("tensors that Transformers ignores too were left out: ") and note.endswith(" and 4 more")


def test_tensors_that_could_be_part_of_another_architecture_are_not_ignored(tmp_path: Path) -> None:
    folder = with_tensors(tmp_path, llama_tensors() | {"model.layers.0.self_attn.q_norm.weight": torch.ones(8)})
    with pytest.raises(CompileError, match=r"found model\.layers\.0\.self_attn\.q_norm\.weight, which the graph does not use"):
        build_graph(open_checkpoint(folder))


def test_integers_in_the_place_of_weights_are_refused(tmp_path: Path) -> None:
    folder = with_tensors(tmp_path, llama_tensors() | {"model.norm.weight": torch.ones(32, dtype=torch.int64)})
    with pytest.raises(CompileError, match=r"tensor model\.norm\.weight in .*: found dtype int64"):
        open_checkpoint(folder)


@pytest.mark.parametrize("size", [None, 0, "300", 3.5, [300]])
def test_a_vocabulary_without_a_size(llama: Path, size: object) -> None:
    write_json(llama / "config.json", LLAMA_CONFIG | {"vocab_size": size})
    with pytest.raises(CompileError, match=r"key vocab_size of config\.json: found "):
        build_graph(open_checkpoint(llama))
