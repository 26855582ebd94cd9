"""Pickled weights: lazily read, and never executed."""

from __future__ import annotations

import pickle
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from belle_compile.compiler.checkpoint.formats.pickles import open_pickle
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
        open_pickle(file)
    assert not trace.exists()
    pickle.loads(pickle.dumps(content["b"]))
    assert trace.exists()  # so the attack itself works


def test_legacy_format(tmp_path: Path) -> None:
    file = write_small_files(tmp_path, BLOOM_CONFIG) / "pytorch_model.bin"
    shared = torch.arange(24.0).reshape(6, 4)
    content = {**bloom_tensors(), "first": shared[:2], "last": shared[4:].t(), "number": torch.tensor(2.5)}
    torch.save(content, file, _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(file)
    read = {tensor.name: tensor for tensor in open_pickle(file)}
    assert [*read] == [*content]
    for name, expected in content.items():
        np.testing.assert_array_equal(read[name].read(), expected.numpy())
        if expected.ndim:
            np.testing.assert_array_equal(read[name].rows(1, 2), expected[1:2].numpy())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.uint8])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_types(tmp_path: Path, dtype: torch.dtype, zipped: bool) -> None:
    torch.manual_seed(0)
    content = {"a": (100 * torch.randn(5, 3)).abs().to(dtype), "b": torch.nn.Parameter(torch.ones(2, 0)), "c": torch.ones(3)}
    torch.save(OrderedDict(content), tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
    a, b, c = open_pickle(tmp_path / "x.bin")
    assert (a.dtype, b.shape, c.read().tolist()) == (str(dtype).removeprefix("torch."), (2, 0), [1, 1, 1])
    np.testing.assert_array_equal(a.rows(1, 4), content["a"][1:4].float().numpy())
    assert b.read().shape == (2, 0)


def test_a_whole_module_with_hooks_and_versions(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    state = module.state_dict(keep_vars=True)
    state["0.weight"].note = "an attribute"  # type: ignore[attr-defined]
    torch.save(state, tmp_path / "x.bin", pickle_protocol=4)
    read = {tensor.name: tensor.read() for tensor in open_pickle(tmp_path / "x.bin")}
    assert {name: values.tolist() for name, values in read.items()} == {name: t.tolist() for name, t in state.items()}


def test_a_file_that_another_one_replaces(tmp_path: Path) -> None:
    file = tmp_path / "x.bin"
    torch.save(bloom_tensors(), file)
    tensor = open_pickle(file)[0]
    torch.save({name: value[:1] for name, value in bloom_tensors().items()}, file)
    with pytest.raises(CompileError, match="found a file that was written meanwhile, expected the file the build began with"):
        tensor.read()


def test_memory_is_that_of_what_is_read(tmp_path: Path) -> None:
    file = tmp_path / "x.bin"
    torch.save({"a": torch.zeros(16 << 20), "b": torch.ones(16, 4)}, file, _use_new_zipfile_serialization=False)
    tracemalloc.start()
    try:
        _, b = open_pickle(file)
        assert b.read().sum() == 64
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_truncated(tmp_path: Path, zipped: bool) -> None:
    file = tmp_path / "pytorch_model.bin"
    torch.save(bloom_tensors(), file, _use_new_zipfile_serialization=zipped)
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(CompileError, match=r"found a file of \d+ bytes that does not load .*; it is truncated or damaged"):
        open_pickle(file)


@pytest.mark.parametrize("content", [b"", b"garbage"])
def test_not_a_pickle(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(CompileError, match=rf"weights .*: found a file of {len(content)} bytes that does not load"):
        open_pickle(tmp_path / "pytorch_model.bin")


def test_more_than_tensors(tmp_path: Path) -> None:
    torch.save({"a": 3}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CompileError, match=r"found a pickled dict that holds more than tensors \(a\), expected a state dict"):
        open_pickle(tmp_path / "pytorch_model.bin")


def test_strided_and_nested(tmp_path: Path) -> None:
    values = torch.arange(12.0).reshape(3, 4)
    torch.save({"state_dict": {"a": values.t()}}, tmp_path / "pytorch_model.bin")
    tensor = open_pickle(tmp_path / "pytorch_model.bin")[0]
    assert tensor.shape == (4, 3) and tensor.read().flags.c_contiguous
    np.testing.assert_array_equal(tensor.rows(1, 3), values.t()[1:3].numpy())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_nothing_stays_mapped(tmp_path: Path) -> None:
    torch.save(bloom_tensors(), tmp_path / "pytorch_model.bin")
    for tensor in open_pickle(tmp_path / "pytorch_model.bin"):
        tensor.read()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
