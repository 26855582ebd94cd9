"""Which of several weights in a directory are read: those that Transformers loads."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from belle_compile.compiler.checkpoint import open_checkpoint
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.reading import Reading
from tests.compiler.checkpoint.models import (
    LLAMA_CONFIG,
    llama_tensors,
    write_json,
    write_sharded,
    write_small_files,
    write_weights,
)

Tensors = dict[str, torch.Tensor]
NORM = "model.norm.weight"
INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
ARRANGEMENTS: dict[str, Callable[[Path, Tensors], None]] = {
    "model.safetensors": lambda folder, tensors: write_weights(folder / "model.safetensors", tensors),
    "safetensors shards": lambda folder, tensors: write_sharded(folder, tensors, "safetensors"),
    "pytorch_model.bin": lambda folder, tensors: write_weights(folder / "pytorch_model.bin", tensors),
    "bin shards": lambda folder, tensors: write_sharded(folder, tensors, "bin"),
}


def scaled(factor: float) -> Tensors:
    return {name: tensor * factor for name, tensor in llama_tensors().items()}


def check_as_transformers(folder: Path) -> tuple[str, ...]:
    """Compare every tensor with Transformers' model of this directory; returns the notes."""
    checkpoint = open_checkpoint(folder)
    loaded = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    for name in llama_tensors():
        np.testing.assert_array_equal(checkpoint.tensors[name].read(), loaded[name].numpy(), err_msg=name)
    return checkpoint.notes


@pytest.mark.parametrize(("older", "newer"), [*permutations(ARRANGEMENTS, 2)], ids=" then ".join)
def test_every_pair_of_arrangements(tmp_path: Path, older: str, newer: str) -> None:
    write_small_files(tmp_path, LLAMA_CONFIG)
    for factor, arrangement in ((0.5, older), (2.0, newer)):
        ARRANGEMENTS[arrangement](tmp_path, scaled(factor))
    (note,) = check_as_transformers(tmp_path)
    assert note.startswith("the weights are those of ") and "passed over: " in note


@pytest.mark.parametrize(("suffix", "single"), [("safetensors", "model.safetensors"), ("bin", "pytorch_model.bin")])
def test_an_index_whose_shards_are_gone(tmp_path: Path, suffix: str, single: str) -> None:
    write_small_files(tmp_path, LLAMA_CONFIG)
    write_sharded(tmp_path, scaled(0.5), suffix)
    for shard in tmp_path.glob("*-of-*"):
        shard.unlink()
    write_weights(tmp_path / single, scaled(2.0))
    assert check_as_transformers(tmp_path) == (f"the weights are those of {single}; passed over: {single}.index.json",)


def test_shards_without_an_index_are_not_preferred_to_a_pickle(tmp_path: Path) -> None:
    write_small_files(tmp_path, LLAMA_CONFIG)
    write_sharded(tmp_path, scaled(0.5), "safetensors")
    (tmp_path / INDEX).unlink()
    write_weights(tmp_path / "pytorch_model.bin", scaled(2.0))
    assert check_as_transformers(tmp_path) == (f"the weights are those of pytorch_model.bin; passed over: {', '.join(SHARDS)}",)


@pytest.mark.parametrize("stated", ["ema.safetensors", "other.safetensors.index.json"])
def test_the_file_that_config_json_names(tmp_path: Path, stated: str) -> None:
    write_small_files(tmp_path, LLAMA_CONFIG | {"transformers_weights": stated})
    write_weights(tmp_path / "model.safetensors", scaled(0.5))
    write_weights(tmp_path / "ema.safetensors", scaled(2.0))
    write_json(
        tmp_path / "other.safetensors.index.json",
        {"metadata": {}, "weight_map": dict.fromkeys(llama_tensors(), "ema.safetensors")},
    )
    (note,) = check_as_transformers(tmp_path)
    assert note.startswith(f"the weights are those of {stated}; passed over: ") and "model.safetensors" in note


@pytest.mark.parametrize("stated", ["../ema.safetensors", "weights.bin", 3])
def test_a_name_in_config_json_that_is_no_weight_file(llama: Path, stated: object) -> None:
    write_json(llama / "config.json", LLAMA_CONFIG | {"transformers_weights": stated})
    with pytest.raises(CompileError, match=r"config\.json: found "):
        open_checkpoint(llama)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_tensor_in_two_shards_counts_as_in_the_last(tmp_path: Path, suffix: str) -> None:
    write_small_files(tmp_path, LLAMA_CONFIG)
    write_sharded(tmp_path, llama_tensors(), suffix)
    for shard, names in zip(sorted(tmp_path.glob(f"*-of-00002.{suffix}")), ([0, 2], [1, 3]), strict=True):
        tensors = {name: tensor for i, (name, tensor) in enumerate(llama_tensors().items()) if i % 2 == names[0] % 2}
        write_weights(shard, tensors | {NORM: torch.full((32,), float(names[0]))})
    (note,) = check_as_transformers(tmp_path)
    assert note.startswith(f"{NORM} is in more than one shard: that of ") and "-00002-of-" in note


def test_tensors_that_the_index_leaves_out(tmp_path: Path) -> None:
    write_small_files(tmp_path, LLAMA_CONFIG)
    write_sharded(tmp_path, llama_tensors(), "safetensors")
    names = [name for name in llama_tensors() if name != "lm_head.weight"]
    write_json(tmp_path / INDEX, {"metadata": {}, "weight_map": {name: SHARDS[len(name) % 2] for name in names}})
    assert check_as_transformers(tmp_path) == ()


def test_weights_of_other_programs_are_noted_and_a_trainer_s_files_are_not(llama: Path) -> None:
    for name in ("adapter_model.safetensors", "consolidated.00.pth", "tf_model.h5", "model.fp16.safetensors", "m.gguf"):
        (llama / name).touch()
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "optimizer.bin"):
        (llama / name).touch()
    assert open_checkpoint(llama).notes == (
        "the weights are those of model.safetensors; passed over: adapter_model.safetensors (a LoRA adapter), "
        "consolidated.00.pth (original LLaMA weights), m.gguf, model.fp16.safetensors and 1 more",
    )


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin", ""])
def test_an_adapter_beside_the_weights_is_refused_or_passed_over(llama: Path, weights: str) -> None:
    if weights:
        (llama / weights).touch()
    with pytest.raises(CompileError, match=r"--ignore-adapter: found no adapter_config\.json .*; leave the option out\.$"):
        open_checkpoint(llama, reading=Reading(ignore_adapter=True))
    write_json(llama / "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "base"})
    with pytest.raises(
        CompileError, match=r"by adapter_config\.json, a LoRA adapter .*; pass --adapter .* or --ignore-adapter"
    ):
        open_checkpoint(llama)
    plain = open_checkpoint(llama, reading=Reading(ignore_adapter=None))
    base = open_checkpoint(llama, reading=Reading(ignore_adapter=True))
    note = "the adapter of adapter_config.json was passed over because --ignore-adapter asked for it: the model is its base"
    assert note in base.notes and note not in plain.notes and base.tensors.keys() == plain.tensors.keys()


def test_a_distributed_checkpoint_is_refused(llama: Path) -> None:
    (llama / "shard-00001-model-00001-of-00002.safetensors").touch()
    with pytest.raises(CompileError, match=r"a shard of a distributed checkpoint, .*; load it with Transformers and save it"):
        open_checkpoint(llama)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 1234567\n" % (b"0" * 64)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_git_lfs_pointers(llama: Path, name: str) -> None:
    (llama / name).write_bytes(POINTER)
    message = rf"file .*{name}: found a Git LFS pointer, expected the file itself, of 1234567 bytes; run `git lfs pull` in "
    with pytest.raises(CompileError, match=message):
        open_checkpoint(llama)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.gguf", "model-00001-of-00001.safetensors", "tokenizer.model"])
def test_git_lfs_pointers_of_other_files(tmp_path: Path, name: str) -> None:
    write_small_files(tmp_path, LLAMA_CONFIG)
    if name == "tokenizer.model":
        (tmp_path / "tokenizer.json").unlink()
        write_weights(tmp_path / "model.safetensors", llama_tensors())
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(CompileError, match="found a Git LFS pointer"):
        open_checkpoint(tmp_path)


def test_a_git_lfs_pointer_among_shards(tmp_path: Path) -> None:
    write_small_files(tmp_path, LLAMA_CONFIG)
    write_sharded(tmp_path, llama_tensors(), "bin")
    (tmp_path / "pytorch_model-00002-of-00002.bin").write_bytes(POINTER)
    with pytest.raises(CompileError, match=r"pytorch_model-00002-of-00002\.bin: found a Git LFS pointer"):
        open_checkpoint(tmp_path)
