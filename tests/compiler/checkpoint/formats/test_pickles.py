"""Pickled weights: lazily read, and never executed."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from belle_compile.compiler.checkpoint import open_checkpoint
from belle_compile.compiler.checkpoint.formats.pickles import LegacyFile, is_legacy, open_pickle
from belle_compile.compiler.errors import CompileError
from tests.compiler.checkpoint.models import BLOOM_CONFIG, Attack, bloom_tensors, write_small_files


@pytest.mark.parametrize("how", ["zip", "legacy", "plain"])
def test_code_is_refused_and_does_not_run(tmp_path: Path, how: str) -> None:
    file, trace = tmp_path / "pytorch_model.bin", tmp_path / "executed"
    content = {"a": torch.ones(2), "b": Attack(trace)}
    if how == "plain":
        file.write_bytes(pickle.dumps(content["b"], protocol=2))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=how == "zip")
    message = r"found a pickle that holds more than tensors .*code in pickles is never run; use a "
    with pytest.raises(CompileError, match=message):
        open_pickle(file, LegacyFile())
    assert not trace.exists()
    pickle.loads(pickle.dumps(content["b"]))
    assert trace.exists()  # so the attack itself works


def test_legacy_format_is_read_and_noted(tmp_path: Path) -> None:
    file = write_small_files(tmp_path, BLOOM_CONFIG) / "pytorch_model.bin"
    torch.save(bloom_tensors(), file, _use_new_zipfile_serialization=False)
    assert is_legacy(file)
    checkpoint = open_checkpoint(tmp_path)
    for name, expected in bloom_tensors().items():
        np.testing.assert_array_equal(checkpoint.tensors[name].rows(1, 3), expected[1:3].numpy())
    assert "pytorch_model.bin: the format of PyTorch before 1.6 cannot be memory-mapped" in checkpoint.notes[0]


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_truncated(tmp_path: Path, zipped: bool) -> None:
    file = tmp_path / "pytorch_model.bin"
    torch.save(bloom_tensors(), file, _use_new_zipfile_serialization=zipped)
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(CompileError, match=r"found a file of \d+ bytes that does not load .*; it is truncated or damaged"):
        open_pickle(file, LegacyFile())


@pytest.mark.parametrize("content", [b"", b"garbage"])
def test_not_a_pickle(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(CompileError, match=rf"weights .*: found a file of {len(content)} bytes that does not load"):
        open_pickle(tmp_path / "pytorch_model.bin", LegacyFile())


def test_more_than_tensors(tmp_path: Path) -> None:
    torch.save({"a": 3}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CompileError, match="found a pickled dict that holds more than tensors, expected a state dict"):
        open_pickle(tmp_path / "pytorch_model.bin", LegacyFile())


def test_strided_and_nested(tmp_path: Path) -> None:
    values = torch.arange(12.0).reshape(3, 4)
    torch.save({"state_dict": {"a": values.t()}}, tmp_path / "pytorch_model.bin")
    tensor = open_pickle(tmp_path / "pytorch_model.bin", LegacyFile())[0]
    assert tensor.shape == (4, 3) and tensor.read().flags.c_contiguous
    np.testing.assert_array_equal(tensor.rows(1, 3), values.t()[1:3].numpy())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_nothing_stays_mapped(tmp_path: Path) -> None:
    torch.save(bloom_tensors(), tmp_path / "pytorch_model.bin")
    for tensor in open_pickle(tmp_path / "pytorch_model.bin", LegacyFile()):
        tensor.read()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
