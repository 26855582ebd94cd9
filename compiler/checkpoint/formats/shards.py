"""Finds the weight files of a Hugging Face directory and checks them against the index."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from belle_compile.compiler.checkpoint.formats.base import read_json
from belle_compile.compiler.checkpoint.formats.pickles import open_pickle
from belle_compile.compiler.checkpoint.formats.safetensors import open_safetensors
from belle_compile.compiler.checkpoint.tensors import STAGE, LazyTensor
from belle_compile.compiler.errors import CompileError

# stem, suffix, opener; the first kind that is there is taken
KINDS: tuple[tuple[str, str, Callable[[Path], list[LazyTensor]]], ...] = (
    ("model", "safetensors", open_safetensors),
    ("pytorch_model", "bin", open_pickle),
)
# What else is found in releases of these families, and what to do with it.
NOT_YET = (
    ("adapter_model.*", "a LoRA adapter", "merge it into its base model (PEFT's merge_and_unload) and give the result"),
    ("*.enc", "an XOR-encrypted release", "decrypt it first with models/decrypt.py of the BELLE repository"),
    ("*.pt", "a GPTQ .pt file", "quantised GPTQ checkpoints are not yet supported: give the checkpoint it was made from"),
    ("*.pth", "original LLaMA weights", "convert them with Transformers' convert_llama_weights_to_hf.py"),
)


def open_weights(directory: Path) -> tuple[list[LazyTensor], list[Path], list[str]]:
    """All tensors under their stored names, the files read, and notes on what was passed over."""
    for number, (stem, suffix, opener) in enumerate(KINDS):
        index = directory / f"{stem}.{suffix}.index.json"
        if index.is_file():
            tensors, files = _open_indexed(directory, index, opener)
        elif shards := _unindexed(directory, stem, suffix):
            tensors, files = [tensor for file in shards for tensor in opener(file)], shards
        else:
            continue
        notes = [
            f"{other} weights are there too and were not used: {suffix} is preferred"
            for other_stem, other, _ in KINDS[number + 1 :]
            if any(directory.glob(f"{other_stem}*.{other}"))
        ]
        return tensors, files, notes
    raise _no_weights(directory)


def _open_indexed(
    directory: Path, index: Path, opener: Callable[[Path], list[LazyTensor]]
) -> tuple[list[LazyTensor], list[Path]]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CompileError(
            STAGE,
            f"index {index}",
            found="no weight_map of tensor names to file names",
            expected="an index as save_pretrained writes it",
            remedy="download it again",
        )
    files = {}
    for name in sorted(set(weight_map.values())):
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
    shards = {name: {tensor.name: tensor for tensor in opener(file)} for name, file in files.items()}
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
    return tensors, [index, *files.values()]


def _unindexed(directory: Path, stem: str, suffix: str) -> list[Path]:
    """The one file, or all numbered shards of a directory whose index was lost."""
    single = directory / f"{stem}.{suffix}"
    if single.is_file():
        return [single]
    shards = sorted(directory.glob(f"{stem}-*-of-*.{suffix}"))
    if shards:
        wanted = int(m.group(1)) if (m := re.search(r"-of-(\d+)\.", shards[0].name)) else 0
        if len(shards) != wanted:
            raise CompileError(
                STAGE,
                f"weights in {directory}",
                found=f"{len(shards)} of {wanted} shards and no index",
                expected=f"{stem}.{suffix}.index.json and every shard",
                remedy="download the missing files",
            )
    return shards


def _no_weights(directory: Path) -> CompileError:
    for pattern, kind, remedy in NOT_YET:
        if file := next(directory.glob(pattern), None):
            return CompileError(
                STAGE,
                f"weights in {directory}",
                found=f"only {file.name}, {kind}",
                expected="model.safetensors or pytorch_model.bin, single or sharded",
                remedy=remedy,
            )
    names = sorted(file.name for file in directory.iterdir())
    return CompileError(
        STAGE,
        f"weights in {directory}",
        found="only " + ", ".join(names[:8]) + (", ..." if len(names) > 8 else ""),
        expected="model.safetensors or pytorch_model.bin, single or sharded, or one .gguf file",
        remedy="download the weight files into this directory",
    )
