"""What `belle-compile build` says of checkpoints and outputs that do not fit: one sentence, exit status 1, nothing left."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import struct
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from belle_compile.compiler import cli, driver
from belle_compile.compiler.directory import AtomicDirectory
from belle_compile.compiler.errors import CompileError
from tests.compiler.checkpoint.models import Attack, write_sharded
from tests.parity.variants import VARIANTS

pytestmark = pytest.mark.usefixtures("no_kernels")
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return VARIANTS["llama_gqa"](tmp_path_factory.mktemp("checkpoints") / "tiny-llama")


@pytest.fixture
def checkpoint(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(original, tmp_path / "checkpoint"))


def build(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit status and stderr."""
    with pytest.raises(SystemExit) as end:
        cli.main(["build", str(checkpoint), "-o", str(checkpoint.parent / "out" / "engine"), "--quiet"])
    return int(end.value.code or 0), capsys.readouterr().err


def refused(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence of a build that fails."""
    status, err = build(checkpoint, capsys)
    assert status == 1 and err.startswith("belle-compile: ") and err.endswith(".\n") and err.count("\n") == 1, err
    assert not (checkpoint.parent / "out").exists()
    return err.removeprefix("belle-compile: ").removesuffix("\n")


def shard(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    write_sharded(checkpoint, tensors, "safetensors")


def missing_shard(checkpoint: Path) -> None:
    shard(checkpoint)
    (checkpoint / SHARDS[1]).unlink()


def truncated(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 100)


def truncated_in_its_header(checkpoint: Path) -> None:
    os.truncate(checkpoint / "model.safetensors", 60)


def shard_outside(checkpoint: Path) -> None:
    shard(checkpoint)
    index = checkpoint / "model.safetensors.index.json"
    shutil.copy(checkpoint / SHARDS[1], checkpoint.parent / "elsewhere.safetensors")
    index.write_text(index.read_text().replace(SHARDS[1], "../elsewhere.safetensors"))


def pickled_code(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    torch.save({**tensors, "extra": Attack(checkpoint / "executed")}, checkpoint / "pytorch_model.bin")


def wrong_shape(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.1.mlp.down_proj.weight"] = tensors["model.layers.1.mlp.down_proj.weight"][:, :-8].contiguous()
    save_file(tensors, weights)


def missing_tensor(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, weights)


def tensor_too_many(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    save_file({**load_file(weights), "model.layers.1.mlp.experts.weight": torch.ones(2)}, weights)


def values_that_are_not_numbers(checkpoint: Path) -> None:
    """Written into the file's data, where the tensor lies."""
    weights = checkpoint / "model.safetensors"
    content = bytearray(weights.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    start = json.loads(content[8 : 8 + length])["model.layers.1.mlp.down_proj.weight"]["data_offsets"][0]
    content[8 + length + start : 8 + length + start + 4] = struct.pack("<f", float("nan"))
    weights.write_bytes(content)


def configure(**changes: Any) -> Callable[[Path], None]:
    def spoil(checkpoint: Path) -> None:
        config = json.loads((checkpoint / "config.json").read_text())
        (checkpoint / "config.json").write_text(json.dumps(config | changes))

    return spoil


# How a checkpoint is spoilt, and what is said then.
WRONG: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing shard": (missing_shard, f"found no file {SHARDS[1]} in "),
    "truncated safetensors": (truncated, "expected a complete "),
    "truncated header": (truncated_in_its_header, "in a file of 60 bytes, expected a complete "),
    "index out of the directory": (
        shard_outside,
        "found the shard '../elsewhere.safetensors', which lies outside of the checkpoint",
    ),
    "pickle with code": (pickled_code, "code in pickles is never run"),
    "wrong shape": (wrong_shape, "model.safetensors: found shape [72, 96], expected shape [72, 104]"),
    "missing tensor": (missing_tensor, "model.layers.1.mlp.down_proj.weight"),
    "tensor too many": (tensor_too_many, "model.layers.1.mlp.experts.weight"),
    "not a number": (
        values_that_are_not_numbers,
        "found NaN or infinity in row 0, expected finite weights; "
        "while computing model.layers.1.mlp.down_proj.weight.rotated.int8 <- rotated <- model.safetensors: model.layers.1.mlp.",
    ),
    "unknown architecture": (configure(model_type="gpt2"), "found 'gpt2', expected bloom, llama"),
    "unsupported value": (
        configure(hidden_act="gelu"),
        "key hidden_act of config.json: found 'gelu', expected no value or 'silu'",
    ),
    "unknown key": (configure(num_experts=8), "key num_experts of config.json: found 8, expected a key this compiler knows"),
    "quantised": (configure(quantization_config={"quant_method": "hqq"}), "quantised HQQ checkpoints are not supported: give "),
    "not quantised": (
        configure(quantization_config={"quant_method": "gptq"}),
        "found no packed weights, expected tensors called ",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_checkpoint(checkpoint: Path, wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, message = WRONG[wrong]
    spoil(checkpoint)
    assert message in refused(checkpoint, capsys)
    assert not (checkpoint / "executed").exists()


@pytest.mark.parametrize(
    ("name", "value", "quantization"),
    [
        ("model.layers.1.mlp.down_proj.weight", math.nan, "none"),
        ("model.layers.0.self_attn.q_proj.weight", math.inf, "none"),
        ("model.embed_tokens.weight", -math.inf, "none"),
        ("model.norm.weight", math.nan, "none"),
        ("model.norm.weight", math.inf, "int8-plain"),
    ],
)
def test_values_that_are_not_numbers_in_weights_that_are_not_quantized(
    checkpoint: Path, name: str, value: float, quantization: str
) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    tensors[name].reshape(-1)[-1] = value
    save_file(tensors, checkpoint / "model.safetensors")
    request = driver.BuildRequest(checkpoint, checkpoint.parent / "engine", drift=False, quantization=quantization)
    with pytest.raises(CompileError, match=r"(tensor|norm|weight).*found NaN or infinity.*expected finite"):
        driver.build(request)
    assert not (checkpoint.parent / "engine").exists()


def test_the_same_checkpoint_unspoilt(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard(checkpoint)
    assert build(checkpoint, capsys)[0] == 0
    assert (checkpoint.parent / "out" / "engine" / "manifest.json").is_file()


def test_a_shard_truncated_while_weights_are_packed(checkpoint: Path) -> None:
    shard(checkpoint)

    def truncate(stage: str, done: int, total: int) -> None:
        if stage == "weights" and done:
            for name in SHARDS:
                os.truncate(checkpoint / name, 4000)

    message = (
        r"weights .*/model-0000\d-of-00002\.safetensors: found a file that was written meanwhile, .*; start the build again"
        r"; while computing (model\.layers\.0\S*|lm_head\S*) <- .*model-0000\d-of-00002\.safetensors: (model|lm_head)\."
    )
    with pytest.raises(CompileError, match=message):
        driver.build(driver.BuildRequest(checkpoint, checkpoint.parent / "engine", on_progress=truncate, drift=False))
    assert not (checkpoint.parent / "engine").exists()


def test_an_output_that_another_build_writes(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = checkpoint.parent / "out" / "engine"
    with AtomicDirectory(out):
        status, err = build(checkpoint, capsys)
    assert status == 1 and f"another build is writing {out}: found .engine.lock locked; wait for it to end" in err


@pytest.mark.parametrize("when", ["estimate", "weights"])
def test_a_full_disk(checkpoint: Path, when: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    if when == "estimate":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 30, 1 << 30, 4096))
        assert "output: not enough free space" in (sentence := refused(checkpoint, capsys))
        assert "found 4096 bytes free" in sentence
    else:
        write, written = os.write, 0

        def full(descriptor: int, data: memoryview) -> int:
            nonlocal written
            written += len(data)
            if written > 100_000:  # the tokenizer and the program fit, the weights do not
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(descriptor, data)

        monkeypatch.setattr(os, "write", full)
        assert "output: No space left on device while writing" in refused(checkpoint, capsys)
