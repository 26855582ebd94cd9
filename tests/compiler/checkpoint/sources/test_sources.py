"""Paths, GGUF files and Hub names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from belle_compile.compiler.checkpoint import open_checkpoint
from belle_compile.compiler.checkpoint.formats.registry import weight_patterns
from belle_compile.compiler.checkpoint.sources.registry import fetch
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.reading import AdapterChoice, Reading
from tests.compiler.checkpoint.models import write_llama


def test_nothing_there(tmp_path: Path) -> None:
    message = r"path .*/none: found nothing there, expected a checkpoint directory, .*; check the path"
    with pytest.raises(CompileError, match=message):
        open_checkpoint(tmp_path / "none")


def test_a_weight_file_instead_of_its_directory(llama: Path) -> None:
    message = r"found a file, expected a checkpoint directory, a \.gguf file or a \.pt file of GPTQ; give the directory that"
    with pytest.raises(CompileError, match=message):
        open_checkpoint(llama / "model.safetensors")


def test_several_gguf_files(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    message = r"found 2 GGUF files: a\.gguf, b\.gguf, expected one; give the path of one of them, such as .*a\.gguf"
    with pytest.raises(CompileError, match=message):
        open_checkpoint(tmp_path)


class Hub:
    """Stands in for the Hub: lists `files`, or raises `error`; the cache holds nothing, or `cached`."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        *,
        files: list[str] | None = None,
        error: Exception | None = None,
        cached: Path | None = None,
    ) -> None:
        self.files, self.error, self.cached = files or [], error, cached
        self.patterns: list[str] = []
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", self.model_info)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)

    def model_info(self, name: str) -> Any:
        if self.error is not None:
            raise self.error
        siblings = [type("Sibling", (), {"rfilename": file}) for file in self.files]
        return type("Info", (), {"siblings": siblings})

    def snapshot_download(self, name: str, *, allow_patterns: list[str] | None = None, local_files_only: bool = False) -> str:
        if local_files_only and self.cached is None:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not cached")
        self.patterns = allow_patterns or []
        return str(self.cached)


@pytest.mark.parametrize(
    ("files", "patterns"),
    [
        (["config.json", "model.safetensors", "pytorch_model.bin"], ["model.safetensors"]),
        (["model.safetensors", "model.safetensors.index.json", "model-00001-of-00001.safetensors"], ["model.safetensors"]),
        (["adapter_model.safetensors", "pytorch_model.bin"], ["pytorch_model.bin"]),
        (["model.safetensors.index.json", "pytorch_model.bin"], ["model.safetensors.index.json", "*.safetensors"]),
        (["pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin"], ["pytorch_model.bin.index.json", "*.bin"]),
        (["pytorch_model.bin", "model-00001-of-00001.safetensors"], ["pytorch_model.bin"]),
        (["x.gguf"], ["*.gguf"]),
        (["params.json", "consolidated.00.pth", "consolidated.01.pth"], ["consolidated.00.pth", "consolidated.[0-9][0-9].pth"]),
        (["README.md", f"config.json.{'0' * 64}.enc", f"pytorch_model.bin.{'0' * 64}.enc"], ["*.enc"]),
        (["README.md"], []),
    ],
)
def test_one_kind_of_weights_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[str], patterns: list[str]
) -> None:
    hub = Hub(monkeypatch, files=files, cached=tmp_path)
    assert fetch("BelleGroup/BELLE-7B-2M", weight_patterns()).path == tmp_path
    assert hub.patterns == ["*.json", "*.jinja", "tokenizer.model", *patterns]


def test_a_local_directory_outranks_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Hub(monkeypatch, error=AssertionError("the Hub was asked"))
    monkeypatch.chdir(tmp_path)
    write_llama(tmp_path / "group" / "model")
    assert open_checkpoint("group/model").family == "llama"


def test_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Hub(monkeypatch, error=ConnectionError("no route"))
    message = (
        r"checkpoint BelleGroup/BELLE-7B-2M: found no such local path, and the Hugging Face Hub cannot be reached "
        r"\(ConnectionError\), expected a local checkpoint or a network; download it where"
    )
    with pytest.raises(CompileError, match=message):
        open_checkpoint("BelleGroup/BELLE-7B-2M")
    Hub(monkeypatch, error=ConnectionError("no route"), cached=tmp_path)
    assert fetch("BelleGroup/BELLE-7B-2M", weight_patterns()).path == tmp_path


def test_adapters_of_the_hub(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = ["README.md", "adapter_config.json", "adapter_model.bin", "adapter_model.safetensors"]
    hub = Hub(monkeypatch, files=files, cached=tmp_path)
    reading = Reading(adapters=(AdapterChoice("BelleGroup/BELLE-LLaMA-LoRA"),))
    with pytest.raises(CompileError, match=r"adapter .*: found a directory without adapter_config\.json"):
        open_checkpoint(llama, reading=reading)
    assert hub.patterns == ["*.json", "*.jinja", "tokenizer.model", "adapter_model.safetensors"]


QUANTS = ["README.md", "m-Q4_0.gguf", "m-Q8_0.gguf", "big/m-F16-00001-of-00002.gguf", "big/m-F16-00002-of-00002.gguf"]


def test_a_repository_of_many_gguf_files_lists_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Hub(monkeypatch, files=QUANTS, cached=tmp_path)
    message = (
        r"checkpoint o/m-GGUF: found 3 models: big/m-F16-00001-of-00002\.gguf, m-Q4_0\.gguf, m-Q8_0\.gguf, expected one "
        r"of them; give its file too, such as o/m-GGUF/big/m-F16-00001-of-00002\.gguf"
    )
    with pytest.raises(CompileError, match=message):
        fetch("o/m-GGUF", weight_patterns())


@pytest.mark.parametrize(
    ("file", "patterns"),
    [
        ("m-Q4_0.gguf", ["m-Q4_0.gguf"]),
        ("big/m-F16-00001-of-00002.gguf", ["big/m-F16-*-of-00002.gguf"]),
        ("big/m-F16-00002-of-00002.gguf", ["big/m-F16-*-of-00002.gguf"]),
    ],
)
def test_one_gguf_file_of_many_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, patterns: list[str]
) -> None:
    hub = Hub(monkeypatch, files=QUANTS, cached=tmp_path)
    assert fetch(f"o/m-GGUF/{file}", weight_patterns()).path == tmp_path / file
    assert hub.patterns == patterns


def test_gptq_files_need_the_small_files_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = ["config.json", "bloom7b-0.2m-8bit-128g.pt", "bloom7b-2m-8bit-128g.pt"]
    hub = Hub(monkeypatch, files=files, cached=tmp_path)
    with pytest.raises(
        CompileError, match=r"found 2 models: bloom7b-0\.2m-8bit-128g\.pt, bloom7b-2m-8bit-128g\.pt, expected one"
    ):
        fetch("BelleGroup/BELLE-7B-gptq", weight_patterns())
    found = fetch(f"BelleGroup/BELLE-7B-gptq/{files[2]}", weight_patterns())
    assert found.path == tmp_path / files[2] and {files[2], "*.json"} <= set(hub.patterns)
    assert files[1] not in hub.patterns


def test_a_gguf_file_that_the_repository_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Hub(monkeypatch, files=QUANTS, cached=tmp_path)
    message = r"found no q2\.gguf in the repository, expected one of m-Q4_0\.gguf, m-Q8_0\.gguf, .*; check the spelling"
    with pytest.raises(CompileError, match=message):
        fetch("o/m-GGUF/q2.gguf", weight_patterns())


def test_gguf_files_beside_other_weights_are_no_choice_to_make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch, files=["model.safetensors", *QUANTS], cached=tmp_path)
    fetch("o/m", weight_patterns())
    assert hub.patterns[-1] == "model.safetensors"


def test_parts_of_one_gguf_model_are_no_choice_to_make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch, files=["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"], cached=tmp_path)
    assert fetch("o/m", weight_patterns()).path == tmp_path
    assert hub.patterns[-1] == "*.gguf"


def test_a_missing_file_of_a_local_directory_is_not_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Hub(monkeypatch, error=AssertionError("the Hub was asked"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    with pytest.raises(CompileError, match="found nothing there"):
        open_checkpoint("models/llama/m.gguf")


def test_a_gguf_file_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Hub(monkeypatch, error=ConnectionError("no route"), cached=tmp_path)
    assert fetch("o/m-GGUF/m-Q4_0.gguf", weight_patterns()).path == tmp_path / "m-Q4_0.gguf"
