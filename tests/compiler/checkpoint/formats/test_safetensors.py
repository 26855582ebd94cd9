"""Damaged safetensors files are refused when they are opened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from belle_compile.compiler.checkpoint import open_checkpoint
from belle_compile.compiler.checkpoint.formats.safetensors import open_safetensors
from belle_compile.compiler.errors import CompileError
from tests.compiler.checkpoint.models import write_weights


def written(file: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return file


def test_truncated_data(llama: Path) -> None:
    file = llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(
        CompileError,
        match=r"found \d+ bytes of tensor data where its header promises \d+, expected a complete "
        r"safetensors file; it is truncated or damaged: download it again",
    ):
        open_checkpoint(llama)


def test_truncated_header(llama: Path) -> None:
    file = llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(CompileError, match=r"found a header of \d+ bytes in a file of 60 bytes, expected a complete"):
        open_checkpoint(llama)
    file.write_bytes(b"abc")
    with pytest.raises(CompileError, match=r"found a file of 3 bytes, expected a complete"):
        open_checkpoint(llama)


ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{]", "a header that is not JSON"),
        ([], "a header that is not a JSON object"),
        ({"a": 3}, "no dtype, shape and data_offsets"),
        ({"a": ENTRY | {"shape": [2, 4]}}, r"24 bytes for tensor a of dtype float32 and shape \[2, 4\]"),
        ({"a": ENTRY | {"data_offsets": [24, 0]}}, "-24 bytes for tensor a"),
    ],
    ids=["not json", "no object", "no entry", "shape", "offsets"],
)
def test_wrong_headers(tmp_path: Path, header: Any, message: str) -> None:
    with pytest.raises(CompileError, match=message):
        open_safetensors(written(tmp_path / "model.safetensors", header, bytes(24)))


def test_scalars_and_float64(tmp_path: Path) -> None:
    write_weights(tmp_path / "model.safetensors", {"a": torch.tensor(2.5), "b": torch.ones(2, dtype=torch.float64)})
    tensors = {tensor.name: tensor for tensor in open_safetensors(tmp_path / "model.safetensors")}
    assert tensors["a"].shape == () and tensors["a"].read() == 2.5
    assert tensors["b"].dtype == "float64" and tensors["b"].read().tolist() == [1, 1]


def test_a_file_that_disappears_before_it_is_read(llama: Path) -> None:
    checkpoint = open_checkpoint(llama)
    (llama / "model.safetensors").unlink()
    with pytest.raises(CompileError, match=r"found a file that changed or cannot be read .*; start the build again"):
        checkpoint.tensors["lm_head.weight"].read()
