"""Check a PyTorch file before it is unpickled: sizes against the file's, and that it asks for nothing but tensors.

PyTorch's restricted unpickler runs no code, but what it allows may take any memory: bytearrays of a stated length, codecs that
double their input, tensors of every class. A state dict needs little of it.
"""

from __future__ import annotations

import mmap
import pickletools
import re
import struct
import zipfile
from pathlib import Path
from typing import IO, Any, cast

_ENTRIES = 1 << 16  # of an archive, one for each storage
_STEPS = 1 << 18  # of a pickle; a tensor takes about 40
_DEEPEST = 16  # tuples in tuples; parameters with attributes have 6
# Instructions by what they do to references and to tuples.
_PUT, _GET = ("PUT", "BINPUT", "LONG_BINPUT"), ("GET", "BINGET", "LONG_BINGET")
_NESTS = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "REDUCE", "NEWOBJ", "BINPERSID")
_PICKLE_BYTES = 8 << 20
# The records at the end of an archive: their signatures, and where they state the number of entries.
_END, _END_BYTES, _END_COUNT = b"PK\x05\x06", 22, struct.Struct("<10xH")
_LOCATOR, _LOCATOR_BYTES, _LOCATOR_OFFSET = b"PK\x06\x07", 20, struct.Struct("<8xQ")
_END64_BYTES, _END64_COUNT = 56, struct.Struct("<32xQ")
_COMMENT_BYTES = 1 << 16
# What the pickle of a state dict names: the dict, storages, dtypes, and the functions that make tensors and parameters of them.
_NAMES = re.compile(
    r"collections OrderedDict|torch(\.storage)? \w+Storage|torch (Tensor|Size|device|u?int\d+|b?float\d+\w*|double|half|bool)"
    r"|torch\._utils _rebuild_(tensor(_v2|_v3)?|parameter(_with_state)?)|torch\._tensor _rebuild_from_type_v2"
    r"|torch\.nn\.parameter Parameter|torch\.serialization _get_layout"
)


class MoreThanTensors(Exception):
    """A pickle that asks for something else than tensors; the message names it."""


def check_archive(file: Path) -> None:
    """Check the directory and the pickle of a file in PyTorch's format since 1.6; raises ValueError, zipfile.BadZipFile or
    `MoreThanTensors`."""
    size = file.stat().st_size
    with file.open("rb") as f:
        entries = _stated_entries(f, size)
        if entries > _ENTRIES:
            raise ValueError(f"an archive of {entries} entries")
        with zipfile.ZipFile(f) as archive:
            listed = archive.infolist()
            if compressed := [entry.filename for entry in listed if entry.compress_type != zipfile.ZIP_STORED]:
                raise ValueError(f"{compressed[0]} is compressed, and PyTorch compresses nothing")
            if sum(entry.file_size for entry in listed) > size:
                raise ValueError("the entries of its archive exceed the file")
            for entry in listed:
                if entry.filename.endswith("/data.pkl"):
                    if entry.file_size > _PICKLE_BYTES:
                        raise ValueError(f"a pickle of {entry.file_size} bytes")
                    with archive.open(entry) as pickled:
                        _check_pickle(pickled)


def check_legacy(file: Path) -> None:
    """Check the pickles that a file in PyTorch's format before 1.6 begins with: a magic number, a version, facts of the host,
    the state dict, and the keys of its storages. Raises ValueError or `MoreThanTensors`."""
    with file.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        for _ in range(5):  # what is no number at first is one pickle, which PyTorch refuses or reads alone
            _check_pickle(cast("IO[bytes]", mapped))


def _check_pickle(stream: IO[bytes]) -> None:
    """Read the instructions of one pickle up to its end, without following them."""
    nesting = _Nesting()
    for step, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if step == _STEPS:
            raise ValueError(f"a pickle of more than {_STEPS} instructions")
        if opcode.name == "GLOBAL" and not _NAMES.fullmatch(str(argument)):
            raise MoreThanTensors(f"GLOBAL {str(argument).replace(' ', '.')[:100]}")
        nesting.follow(opcode, argument)


class _Nesting:
    """The depths to which values on the unpickler's stack are nested in tuples.

    A tuple of two references to the same tuple, and so on, is short to write, but takes a time exponential in its depth when it
    is hashed as a key of a dict.
    """

    def __init__(self) -> None:
        self._stack: list[int | None] = []  # None is a mark
        self._memo: dict[Any, int] = {}

    def follow(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        """Do to the stack of depths what an instruction does to that of values; raises ValueError for too deep a value."""
        if opcode.name in _PUT:
            self._memo[argument] = self._stack[-1] or 0
        elif opcode.name in _GET:
            self._stack.append(self._memo[argument])
        elif opcode.name == "MARK":
            self._stack.append(None)
        else:
            taken = self._popped(opcode)
            depth = 1 + max(taken, default=0) if opcode.name in _NESTS else 0
            if depth > _DEEPEST:
                raise ValueError(f"values nested in tuples more than {_DEEPEST} deep")
            self._stack += [depth] * len(opcode.stack_after)

    def _popped(self, opcode: pickletools.OpcodeInfo) -> list[int]:
        """Remove what an instruction takes from the stack."""
        taken: list[int] = []
        fixed = list(opcode.stack_before)
        if pickletools.markobject in fixed:
            while (depth := self._stack.pop()) is not None:
                taken.append(depth)
            fixed = fixed[: fixed.index(pickletools.markobject)]
        return taken + [self._stack.pop() or 0 for _ in fixed]


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
