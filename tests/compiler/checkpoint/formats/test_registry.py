"""A format and a source in a few lines each, as the contracts say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from belle_compile.compiler.checkpoint import LazyTensor, open_checkpoint
from belle_compile.compiler.checkpoint.formats import registry as formats
from belle_compile.compiler.checkpoint.formats.base import Contents
from belle_compile.compiler.checkpoint.sources import registry as sources
from belle_compile.compiler.checkpoint.sources.base import Files
from belle_compile.compiler.errors import CompileError
from tests.compiler.checkpoint.models import LLAMA_CONFIG, byte_tokenizer, llama_tensors, write_llama


class Arrays:
    """A .npz file that holds the tensors; config and tokenizer are made up."""

    weights = ("*.npz",)

    def recognises(self, files: Files) -> bool:
        return bool(files.matching("model.npz"))

    def read(self, files: Files) -> Contents:
        (file,) = files.matching("model.npz")
        arrays = np.load(file)
        tensors = [
            LazyTensor(
                name, arrays[name].shape, "float32", file, lambda start, stop, name=name: np.load(file)[name][start:stop]
            )
            for name in arrays.files
        ]
        return Contents(LLAMA_CONFIG, tensors, str(byte_tokenizer().to_str()), files=[file])


class Reversed:
    """Files whose names are spelled backwards."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, []

    def recognises(self, name: str) -> bool:
        return name.startswith("reversed:")

    def fetch(self, name: str, weights: Sequence[Sequence[str]]) -> Files:
        self.asked = list(weights)
        return Files(self.folder / name.removeprefix("reversed:")[::-1], notes=("its name was spelled backwards",))


@pytest.fixture
def arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "FORMATS", (*formats.FORMATS, Arrays()))


@pytest.mark.usefixtures("arrays")
@pytest.mark.parametrize("alone", [True, False], ids=["file", "directory"])
def test_a_format_that_holds_everything(tmp_path: Path, alone: bool) -> None:
    np.savez(tmp_path / "model.npz", **{name: tensor.numpy() for name, tensor in llama_tensors().items()})
    checkpoint = open_checkpoint(tmp_path / "model.npz" if alone else tmp_path)
    for name, tensor in llama_tensors().items():
        np.testing.assert_array_equal(checkpoint.tensors[name].read(), tensor.numpy())
    assert list(checkpoint.digests()) == ["model.npz"] and checkpoint.family == "llama"


@pytest.mark.usefixtures("arrays")
def test_formats_are_asked_in_order(llama: Path) -> None:
    np.savez(llama / "model.npz", a=np.ones(2))
    assert open_checkpoint(llama).notes == ("the weights are those of model.safetensors; passed over: model.npz",)


@pytest.mark.usefixtures("arrays")
def test_a_source_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Reversed(tmp_path)
    monkeypatch.setattr(sources, "SOURCES", (source, *sources.SOURCES))
    write_llama(tmp_path / "abc")
    checkpoint = open_checkpoint("reversed:cba")
    assert checkpoint.path == tmp_path / "abc" and checkpoint.notes == ("its name was spelled backwards",)
    assert [patterns[0] for patterns in source.asked if patterns] == [
        "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
        "model-*-of-*.safetensors", "pytorch_model-*-of-*.bin", "consolidated.00.pth", "*.gguf", "*.pt", "*.npz", "*.enc",
    ]  # fmt: skip


def test_adapters_beside_a_gguf_file_are_not_passed_over(tmp_path: Path) -> None:
    write_llama(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "adapter_model.safetensors")
    (tmp_path / "m.gguf").touch()
    with pytest.raises(
        CompileError, match=r"found only adapter_model\.safetensors, a LoRA adapter, expected model\.safetensors"
    ):
        open_checkpoint(tmp_path)
