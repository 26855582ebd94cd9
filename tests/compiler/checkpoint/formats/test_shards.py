"""Shards, indices, and directories without usable weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from belle_compile.compiler.checkpoint import open_checkpoint
from belle_compile.compiler.errors import CompileError
from tests.compiler.checkpoint.models import LLAMA_CONFIG, llama_tensors, write_json, write_sharded, write_small_files

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    directory = write_small_files(tmp_path / "sharded", LLAMA_CONFIG)
    write_sharded(directory, llama_tensors(), "safetensors")
    return directory


def test_missing_shard(sharded: Path) -> None:
    (sharded / SECOND).unlink()
    message = rf"index .*: found no file {SECOND} in .*, expected every shard .*; download the missing"
    with pytest.raises(CompileError, match=message):
        open_checkpoint(sharded)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/../../x", "..\\x", "C:x"])
def test_shard_outside_of_the_directory(sharded: Path, name: str) -> None:
    write_json(sharded / INDEX, {"weight_map": {"a": name}})
    message = r"found the shard .*, which lies outside of the checkpoint, expected file names inside"
    with pytest.raises(CompileError, match=message):
        open_checkpoint(sharded)


def test_shards_that_are_links_are_fine(sharded: Path, tmp_path: Path) -> None:
    blob = tmp_path / "blob"  # as in the Hub's cache
    (sharded / FIRST).rename(blob)
    (sharded / FIRST).symlink_to(blob)
    assert set(open_checkpoint(sharded).tensors) == set(llama_tensors())


def test_tensor_that_its_shard_does_not_hold(sharded: Path) -> None:
    write_json(sharded / INDEX, {"weight_map": {"model.extra.weight": FIRST, "model.norm.weight": SECOND}})
    with pytest.raises(CompileError, match=rf"found tensor model\.extra\.weight placed in {FIRST}, which does not hold it"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {"a": 1}}])
def test_index_without_a_map(sharded: Path, index: object) -> None:
    write_json(sharded / INDEX, index)
    with pytest.raises(CompileError, match="found no weight_map of tensor names to file names"):
        open_checkpoint(sharded)


def test_a_lost_index_does_no_harm(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    assert set(open_checkpoint(sharded).tensors) == set(llama_tensors())
    (sharded / FIRST).unlink()
    message = r"found 1 of 2 shards and no index, expected model\.safetensors\.index\.json and every"
    with pytest.raises(CompileError, match=message):
        open_checkpoint(sharded)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (
            "README.md",
            r"found only README\.md, config\.json, tokenizer\.json, expected model\.safetensors or pytorch_model\.bin",
        ),
        (
            "adapter_model.bin",
            r"found only adapter_model\.bin, a LoRA adapter, .*; give its base model, and this directory with --adapter",
        ),
        ("x.0123.enc", "an XOR-encrypted release, .*; give its key with --key"),
        ("consolidated.00.pth", r"original LLaMA weights, .*; put params\.json and every part"),
    ],
)
def test_no_usable_weights(tmp_path: Path, file: str, message: str) -> None:
    (write_small_files(tmp_path, LLAMA_CONFIG) / file).write_bytes(b"")
    with pytest.raises(CompileError, match=message):
        open_checkpoint(tmp_path)
