"""Pickled PyTorch weights (.bin, .pth): no code in them can run, and values stay in the file until they are read."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable, Iterable
from math import prod
from typing import IO, Any

from belle_compile.compiler.checkpoint.formats.shards import Storage as WeightFiles
from belle_compile.compiler.checkpoint.formats.state_pickle import (
    MOST_BYTES,
    MoreThanTensors,
    PickledTensor,
    Storage,
    read_pickle,
)
from belle_compile.compiler.checkpoint.tensors import ITEM_BYTES, STAGE, LazyTensor, StoredValues, stamp_of
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.lfs import refuse_pointer
from belle_compile.compiler.stored_path import StoredPath
from belle_compile.compiler.untrusted import explained

ARCHIVE_MAGIC, LEGACY_MAGIC = b"PK\x03\x04", b"\x80\x02"  # the first bytes of PyTorch's formats since 1.6 and before
_ENTRIES = 1 << 16  # of an archive, one for each storage
# The records at the end of an archive: their signatures, and where they state the number of entries.
_END, _END_BYTES, _END_COUNT = b"PK\x05\x06", 22, struct.Struct("<10xH")
_LOCATOR, _LOCATOR_BYTES, _LOCATOR_OFFSET = b"PK\x06\x07", 20, struct.Struct("<8xQ")
_END64_BYTES, _END64_COUNT = 56, struct.Struct("<32xQ")
_COMMENT_BYTES = 1 << 16
# The record before an entry of an archive: its signature, and the lengths of the two fields that follow it.
_ENTRY, _ENTRY_BYTES, _ENTRY_LENGTHS = b"PK\x03\x04", 30, struct.Struct("<26xHH")
# The first two pickles of a file in the format before 1.6.
_LEGACY_NUMBER, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001

Locate = Callable[[Storage], tuple[int, int]]


def open_pickle(file: StoredPath) -> list[LazyTensor]:
    """The tensors of one file, under the names stored in it.

    Raises CompileError if the file is damaged or holds anything but tensors.
    """
    refuse_pointer(file)
    stamp = stamp_of(file)
    found = f"a file of {stamp[0]} bytes that does not load"
    remedy = "it is truncated or damaged: download it again"
    with explained(STAGE, f"weights {file}", found=found, expected="a complete PyTorch state dict", remedy=remedy):
        try:
            with file.open("rb") as f:
                state, locate = _read_archive(f, stamp[0]) if _is_archive(f) else _read_legacy(f, stamp[0])
        except MoreThanTensors as e:
            raise CompileError(
                STAGE,
                f"weights {file}",
                found=f"a pickle that holds more than tensors ({e})",
                expected="a state dict of tensors; code in pickles is never run",
                remedy="use a safetensors release of this checkpoint",
            ) from e
        if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
            state = state["state_dict"]
        tensors = [_tensor(file, stamp, name, value, locate) for name, value in _named(state)]
        other = next((each for each in tensors if isinstance(each, str)), None)
        if other is not None or not isinstance(state, dict):
            raise CompileError(
                STAGE,
                f"weights {file}",
                found=f"a pickled {type(state).__name__} that holds more than tensors" + (f" ({other})" if other else ""),
                expected="a state dict as save_pretrained writes it",
            )
        return [each for each in tensors if isinstance(each, LazyTensor)]


def _named(state: Any) -> Iterable[tuple[Any, Any]]:
    return state.items() if isinstance(state, dict) else ()


def _tensor(file: StoredPath, stamp: tuple[int, int], name: Any, value: Any, locate: Locate) -> LazyTensor | str:
    """The tensor of an entry of a state dict; the name of the entry if it is none, or has more values than the file."""
    if type(name) is not str or not isinstance(value, PickledTensor):
        return name[:100] if type(name) is str else f"a {type(name).__name__} as a name"
    storage, item_bytes = value.storage, ITEM_BYTES.get(value.dtype)
    if item_bytes is None:
        return f"{name[:100]} of type {value.dtype}"
    start, size = locate(storage)
    if prod(value.shape) * item_bytes > size:
        return name[:100]
    last = value.offset + sum((length - 1) * step for length, step in zip(value.shape, value.strides, strict=True))
    if 0 not in value.shape and (last + 1) * item_bytes > size:
        raise ValueError(f"tensor {name[:100]} exceeds its storage")
    load = StoredValues(file, stamp, start + value.offset * item_bytes, value.dtype, value.shape, value.strides)
    return LazyTensor(name, value.shape, value.dtype, file, load)


PICKLES = WeightFiles("pytorch_model", "bin", lambda: open_pickle)  # pytorch_model.bin or shards of it


def _is_archive(f: IO[bytes]) -> bool:
    """Whether a file is in PyTorch's format since 1.6."""
    start = f.read(len(ARCHIVE_MAGIC))
    f.seek(0)
    return start == ARCHIVE_MAGIC


def _read_archive(f: IO[bytes], size: int) -> tuple[Any, Locate]:
    """The value in the pickle of an archive, and where each storage lies in the file: (first byte, bytes)."""
    entries = _stated_entries(f, size)
    if entries > _ENTRIES:
        raise ValueError(f"an archive of {entries} entries")
    f.seek(0)
    with zipfile.ZipFile(f) as archive:
        listed = {entry.filename: entry for entry in archive.infolist()}
        if compressed := [entry.filename for entry in listed.values() if entry.compress_type != zipfile.ZIP_STORED]:
            raise ValueError(f"{compressed[0]} is compressed, and PyTorch compresses nothing")
        if sum(entry.file_size for entry in archive.infolist()) > size:
            raise ValueError("the entries of its archive exceed the file")
        pickled = next((name for name in listed if name.count("/") == 1 and name.endswith("/data.pkl")), None)
        if pickled is None:
            raise ValueError("its archive has no data.pkl")
        if listed[pickled].file_size > MOST_BYTES:
            raise ValueError(f"a pickle of {listed[pickled].file_size} bytes")
        folder = pickled.removesuffix("data.pkl")
        order = listed.get(f"{folder}byteorder")
        if order is not None and archive.read(order) != b"little":
            raise ValueError("its byte order is not little-endian")
        with archive.open(pickled) as stream:
            state, storages = read_pickle(stream)
    places = {storage.key: _place(f, listed, f"{folder}data/{storage.key}", size) for storage in storages}
    return state, lambda storage: _part(storage, *places[storage.key])


def _place(f: IO[bytes], listed: dict[str, zipfile.ZipInfo], name: str, size: int) -> tuple[int, int]:
    """The place of an entry's bytes in an archive, which begin behind a record of their own."""
    if name not in listed:
        raise ValueError(f"its archive has no {name}")
    entry = listed[name]
    f.seek(entry.header_offset)
    record = f.read(_ENTRY_BYTES)
    if len(record) < _ENTRY_BYTES or not record.startswith(_ENTRY):
        raise ValueError(f"{name} is not where its archive says")
    start = entry.header_offset + _ENTRY_BYTES + sum(_ENTRY_LENGTHS.unpack(record))
    if start + entry.file_size > size:
        raise ValueError(f"{name} exceeds the file")
    return start, entry.file_size


def _part(storage: Storage, start: int, size: int) -> tuple[int, int]:
    """The place of a storage that may be a part of the values at a place."""
    item_bytes = ITEM_BYTES[storage.dtype]
    before, own = storage.start * item_bytes, storage.count * item_bytes
    if before + own > size:
        raise ValueError(f"storage {storage.key} exceeds its bytes")
    return start + before, own


def _read_legacy(f: IO[bytes], size: int) -> tuple[Any, Locate]:
    """The same of a file in PyTorch's format before 1.6: pickles of a magic number, a version, facts of the host, the state
    dict, and the keys of its storages, whose values follow in this order, each with their number before them."""
    number, _ = read_pickle(f)
    if number != _LEGACY_NUMBER:
        raise ValueError("it does not begin as PyTorch's files do")
    version, _ = read_pickle(f)
    host, _ = read_pickle(f)
    if version != _LEGACY_VERSION or not isinstance(host, dict) or host.get("little_endian") is not True:
        raise ValueError("its version or its byte order is another")
    state, storages = read_pickle(f)
    keys, _ = read_pickle(f)
    dtypes = {storage.key: storage.dtype for storage in storages}
    places: dict[str, tuple[int, int]] = {}
    at = f.tell()
    for key in keys if isinstance(keys, list) else ():
        f.seek(at)
        count = int.from_bytes(f.read(8), "little")
        own = count * ITEM_BYTES[dtypes[key]]
        if at + 8 + own > size:
            raise ValueError(f"storage {key} exceeds the file")
        places[key] = at + 8, own
        at += 8 + own
    return state, lambda storage: _part(storage, *places[storage.key])


def _stated_entries(f: IO[bytes], size: int) -> int:
    """The number of entries that the end of an archive states."""
    tail_bytes = min(size, _END_BYTES + _COMMENT_BYTES + _LOCATOR_BYTES)
    f.seek(size - tail_bytes)
    tail = f.read(tail_bytes)
    at = tail.rfind(_END)
    if at < 0 or len(tail) - at < _END_BYTES:
        raise ValueError("the end of its archive is missing")
    count: int = _END_COUNT.unpack_from(tail, at)[0]
    locator = tail[max(at - _LOCATOR_BYTES, 0) : at]
    if locator.startswith(_LOCATOR) and len(locator) == _LOCATOR_BYTES:
        offset = _LOCATOR_OFFSET.unpack_from(locator)[0]
        if offset + _END64_BYTES > size:
            raise ValueError("the end of its archive lies outside of the file")
        f.seek(offset)
        count = max(count, _END64_COUNT.unpack_from(f.read(_END64_BYTES))[0])
    return count
