"""Weight files of a Hugging Face directory: one file, or shards that an index lists."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from belle_compile.compiler.checkpoint.formats.huggingface import Weights
from belle_compile.compiler.checkpoint.json_files import read_json
from belle_compile.compiler.checkpoint.tensors import DERIVED_BUFFERS, STAGE, LazyTensor, require_float
from belle_compile.compiler.errors import CompileError

OpenFile = Callable[[Path], list[LazyTensor]]


def has_weights(directory: Path, stem: str, suffix: str) -> bool:
    """Whether a directory holds `stem`.`suffix`, numbered shards of it, or an index of shards."""
    single = directory / f"{stem}.{suffix}"
    return _index(directory, stem, suffix).is_file() or single.is_file() or bool(_numbered(directory, stem, suffix))


def open_weights(directory: Path, stem: str, suffix: str, open_file: OpenFile) -> Weights:
    """All tensors of a directory, which must hold floats; `open_file` returns those of one file.

    Raises CompileError if the index and its shards do not belong together, or if a tensor holds anything but floats.
    """
    index = _index(directory, stem, suffix)
    if index.is_file():
        weights = _open_indexed(directory, index, open_file)
    else:
        files = _unindexed(directory, stem, suffix)
        weights = Weights([tensor for file in files for tensor in open_file(file)], files)
    for tensor in weights.tensors:
        if not tensor.name.endswith(DERIVED_BUFFERS):
            require_float(tensor)
    return weights


def _index(directory: Path, stem: str, suffix: str) -> Path:
    return directory / f"{stem}.{suffix}.index.json"


def _numbered(directory: Path, stem: str, suffix: str) -> list[Path]:
    return sorted(directory.glob(f"{stem}-*-of-*.{suffix}"))


def _open_indexed(directory: Path, index: Path, open_file: OpenFile) -> Weights:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CompileError(
            STAGE,
            f"index {index}",
            found="no weight_map of tensor names to file names",
            expected="an index as save_pretrained writes it",
            remedy="download it again",
        )
    files = _listed_files(directory, index, sorted(set(weight_map.values())))
    shards = {name: {tensor.name: tensor for tensor in open_file(file)} for name, file in files.items()}
    tensors = []
    for tensor_name, file_name in weight_map.items():
        if tensor_name not in shards[file_name]:
            raise CompileError(
                STAGE,
                f"index {index}",
                expected="an index that belongs to its shards",
                found=f"tensor {tensor_name} placed in {file_name}, which does not hold it",
                remedy="download the index and the shards again",
            )
        tensors.append(shards[file_name][tensor_name])
    return Weights(tensors, [index, *files.values()])


def _listed_files(directory: Path, index: Path, names: Sequence[str]) -> dict[str, Path]:
    """The files that an index lists, by name; raises CompileError for one that is missing or outside of the directory."""
    files = {}
    for name in names:
        plain = PurePosixPath(name)
        if plain.is_absolute() or ".." in plain.parts or "\\" in name or ":" in name:
            raise CompileError(
                STAGE,
                f"index {index}",
                found=f"the shard {name!r}, which lies outside of the checkpoint",
                expected="file names inside the directory",
                remedy="do not use a checkpoint that reaches for other files",
            )
        if not (directory / name).is_file():
            raise CompileError(
                STAGE,
                f"index {index}",
                found=f"no file {name} in {directory}",
                expected="every shard that the index names",
                remedy="download the missing shard",
            )
        files[name] = directory / name
    return files


def _unindexed(directory: Path, stem: str, suffix: str) -> list[Path]:
    """The single file of weights, or all numbered shards if their index is missing."""
    single = directory / f"{stem}.{suffix}"
    if single.is_file():
        return [single]
    shards = _numbered(directory, stem, suffix)
    count = int(m.group(1)) if (m := re.search(r"-of-(\d+)\.", shards[0].name)) else 0
    if len(shards) != count:
        raise CompileError(
            STAGE,
            f"weights in {directory}",
            found=f"{len(shards)} of {count} shards and no index",
            expected=f"{stem}.{suffix}.index.json and every shard",
            remedy="download the missing files",
        )
    return shards
