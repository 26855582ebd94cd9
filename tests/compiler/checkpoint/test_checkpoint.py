"""The helpers of an opened checkpoint."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from belle_compile.compiler.checkpoint import open_checkpoint
from belle_compile.compiler.errors import CompileError


def test_tensor_of_the_expected_shape(llama: Path) -> None:
    checkpoint = open_checkpoint(llama)
    assert checkpoint.tensor("model.norm.weight", (32,)) is checkpoint.tensors["model.norm.weight"]


def test_tensor_of_another_shape(llama: Path) -> None:
    message = r"tensor lm_head\.weight in .*: found shape \[300, 32\], expected shape \[310, 32\]; "
    with pytest.raises(CompileError, match=message):
        open_checkpoint(llama).tensor("lm_head.weight", (310, 32))


def test_missing_tensor_lists_near_names(llama: Path) -> None:
    with pytest.raises(CompileError, match=r"found no such tensor; near names: .*lm_head\.weight.*, expected shape \[2\]"):
        open_checkpoint(llama).tensor("lm_haed.weight", (2,))


def test_rows_outside_of_the_tensor(llama: Path) -> None:
    tensor = open_checkpoint(llama).tensors["model.norm.weight"]
    assert tensor.rows(4, 4).shape == (0,)
    with pytest.raises(IndexError, match=r"rows 30\.\.33 of model\.norm\.weight"):
        tensor.rows(30, 33)


def test_digests_of_every_file_read(llama: Path) -> None:
    (llama / "README.md").write_text("not read")
    seen: list[tuple[str, int, int]] = []
    digests = open_checkpoint(llama).digests(lambda file, done, total: seen.append((file.name, done, total)))
    assert digests == {
        name: hashlib.sha256((llama / name).read_bytes()).hexdigest()
        for name in ("config.json", "model.safetensors", "tokenizer.json")
    }
    assert seen[-1][1] == seen[-1][2] == sum((llama / name).stat().st_size for name in digests)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_nothing_stays_mapped(llama: Path) -> None:
    checkpoint = open_checkpoint(llama)
    checkpoint.tensors["lm_head.weight"].rows(0, 5)
    assert str(llama) not in Path("/proc/self/maps").read_text()
