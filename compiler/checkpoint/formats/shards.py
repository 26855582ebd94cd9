"""Weight files of a Hugging Face directory: one file, or shards, with an index of them or without."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Protocol

from belle_compile.compiler.checkpoint.formats.base import Contents
from belle_compile.compiler.checkpoint.formats.huggingface import CONFIG, Weights, read_release
from belle_compile.compiler.checkpoint.sources.base import Files
from belle_compile.compiler.checkpoint.tensors import STAGE, LazyTensor
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.json_files import read_json
from belle_compile.compiler.stored_path import StoredPath, by_name

OpenFile = Callable[[StoredPath], list[LazyTensor]]
STATED_KEY = "transformers_weights"  # of config.json: the name of the file to load


@dataclass(frozen=True)
class Storage:
    """A way of storing tensors in files: `stem`.`suffix`, or shards of it.

    `opener()` returns the function that opens one file of a checkpoint, and `notes(files)` sentences about the files opened.
    """

    stem: str
    suffix: str
    opener: Callable[[], OpenFile]
    notes: Callable[[Sequence[StoredPath]], list[str]] = field(default=lambda files: [])

    @property
    def single(self) -> str:
        return f"{self.stem}.{self.suffix}"

    @property
    def index(self) -> str:
        return f"{self.single}.index.json"


class Layout(Protocol):
    """One arrangement of weight files in a directory."""

    def patterns(self, storage: Storage) -> tuple[str, ...]:
        """Glob patterns of the files to download; the arrangement is there if a file matches the first one."""

    def recognises(self, directory: StoredPath, storage: Storage) -> bool:
        """Whether a directory holds this arrangement."""

    def open(self, directory: StoredPath, storage: Storage) -> Weights:
        """All tensors of the directory; raises CompileError if files are missing or do not belong together."""


class Single:
    """One file."""

    def patterns(self, storage: Storage) -> tuple[str, ...]:
        return (storage.single,)

    def recognises(self, directory: StoredPath, storage: Storage) -> bool:
        return (directory / storage.single).is_file()

    def open(self, directory: StoredPath, storage: Storage) -> Weights:
        file = directory / storage.single
        return Weights(storage.opener()(file), [file], storage.notes([file]))


class Indexed:
    """Shards that an index lists."""

    def patterns(self, storage: Storage) -> tuple[str, ...]:
        return storage.index, f"*.{storage.suffix}"

    def recognises(self, directory: StoredPath, storage: Storage) -> bool:
        return (directory / storage.index).is_file()

    def open(self, directory: StoredPath, storage: Storage) -> Weights:
        return _open_indexed(directory, directory / storage.index, storage)


class Numbered:
    """All shards, without the index that lists them. Transformers does not load these."""

    def patterns(self, storage: Storage) -> tuple[str, ...]:
        return (f"{storage.stem}-*-of-*.{storage.suffix}",)

    def recognises(self, directory: StoredPath, storage: Storage) -> bool:
        return bool(self._files(directory, storage))

    def open(self, directory: StoredPath, storage: Storage) -> Weights:
        files, open_file = self._files(directory, storage), storage.opener()
        count = int(m.group(1)) if (m := re.search(r"-of-(\d+)\.", files[0].name)) else 0
        if len(files) != count:
            raise CompileError(
                STAGE,
                f"weights in {directory}",
                found=f"{len(files)} of {count} shards and no index",
                expected=f"{storage.index} and every shard",
                remedy="download the missing files",
            )
        return Weights([tensor for file in files for tensor in open_file(file)], files, storage.notes(files))

    def _files(self, directory: StoredPath, storage: Storage) -> list[StoredPath]:
        (pattern,) = self.patterns(storage)
        return by_name(directory.glob(pattern))


class Stated:
    """The file or the index that `transformers_weights` in config.json names."""

    def patterns(self, storage: Storage) -> tuple[str, ...]:
        return ()  # the name is known only after config.json was downloaded

    def recognises(self, directory: StoredPath, storage: Storage) -> bool:
        return (directory / CONFIG).is_file() and self._name(directory) is not None

    def open(self, directory: StoredPath, storage: Storage) -> Weights:
        name = self._name(directory)
        if not isinstance(name, str) or not name.endswith((f".{storage.suffix}", f".{storage.suffix}.index.json")):
            raise CompileError(
                STAGE,
                f"key {STATED_KEY} of {directory / CONFIG}",
                found=repr(name),
                expected=f"the name of a .{storage.suffix} file or of an index of such files",
                remedy="correct the key, or remove it",
            )
        ((_, file),) = _listed_files(directory, directory / CONFIG, [name]).items()
        if name.endswith(".json"):
            return _open_indexed(directory, file, storage)
        return Weights(storage.opener()(file), [file], storage.notes([file]))

    def _name(self, directory: StoredPath) -> object:
        return read_json(directory / CONFIG).get(STATED_KEY)


@dataclass(frozen=True)
class Release:
    """The format of Hugging Face directories whose weights are stored in this way, in this arrangement."""

    storage: Storage
    layout: Layout

    @property
    def weights(self) -> tuple[str, ...]:
        return self.layout.patterns(self.storage)

    def recognises(self, files: Files) -> bool:
        return files.directory is not None and self.layout.recognises(files.directory, self.storage)

    def read(self, files: Files) -> Contents:
        return read_release(files.path, lambda directory: self.layout.open(directory, self.storage))


def _open_indexed(directory: StoredPath, index: StoredPath, storage: Storage) -> Weights:
    """The tensors of all files that an index lists. As in Transformers, of tensors with one name that of the last file counts,
    whichever the index names."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(file, str) for file in weight_map.values()):
        raise CompileError(
            STAGE,
            f"index {index}",
            found="no weight_map of tensor names to file names",
            expected="an index as save_pretrained writes it",
            remedy="download it again",
        )
    files = list(_listed_files(directory, index, sorted(set(weight_map.values()))).values())
    open_file = storage.opener()
    tensors: dict[str, LazyTensor] = {}
    twice = []
    for file in files:
        for tensor in open_file(file):
            twice += [tensor.name] if tensor.name in tensors else []
            tensors[tensor.name] = tensor
    for name, file_name in weight_map.items():
        if name not in tensors:
            raise CompileError(
                STAGE,
                f"index {index}",
                expected="an index that belongs to its shards",
                found=f"tensor {name} placed in {file_name}, which does not hold it",
                remedy="download the index and the shards again",
            )
    notes = [f"{name} is in more than one shard: that of {tensors[name].file.name}, the last, is used" for name in twice]
    return Weights(list(tensors.values()), [index, *files], [*storage.notes(files), *notes])


def _listed_files(directory: StoredPath, index: StoredPath, names: Sequence[str]) -> dict[str, StoredPath]:
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
