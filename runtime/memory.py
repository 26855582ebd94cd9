"""Aligned memory for kernels: anonymous pages, and tensors mapped from a safetensors file."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import math
import mmap
import operator
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.program import ALIGNMENT
from belle_compile.runtime.schema import parse_json

# Bytes of an element of each type that safetensors files of engines hold, by the format's names.
DTYPE_BYTES = {"I8": 1, "U8": 1, "F16": 2, "BF16": 2, "I32": 4, "F32": 4, "I64": 8}
_HUGE_PAGE = 2 << 20
_MAP_NORESERVE = 0x4000  # Linux's value; the module mmap has the name only since Python 3.12
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # glibc's values
_REMEDY = "copy the engine again or rebuild it"


def anonymous(size: int, huge_pages: bool = True) -> NDArray[np.uint8]:
    """Allocate `size` zero bytes, aligned to a page. Pages take no memory until they are touched; large mappings request huge
    pages, or refuse them. Raises `EngineError` where there is too little address space."""
    try:
        mapped = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    except OSError as error:
        remedy = "load with less memory for the KV cache, or on a larger host"
        raise EngineError("cpu", "memory", found=f"{error} for {size / 2**30:.1f} GiB", remedy=remedy) from None
    if huge_pages:
        _request_huge_pages(mapped)
    elif hasattr(mmap, "MADV_NOHUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without transparent huge pages
            mapped.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(mapped, np.uint8)


def give_back(array: NDArray[np.float32]) -> None:
    """Give the memory of a contiguous part of an anonymous mapping back to the system, as far as it is whole pages; these hold
    zeros afterwards."""
    page = mmap.PAGESIZE
    start = -(-array.ctypes.data // page) * page
    stop = (array.ctypes.data + array.nbytes) // page * page
    if start < stop and hasattr(mmap, "MADV_DONTNEED"):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED)


def share_heap() -> None:
    """Let threads that begin later share one C heap, where the C library can. glibc gives each thread a heap of its own, in
    which memory that another one needs stays free. A process of Python waits for a heap rarely: it has another lock."""
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_M_ARENA_MAX, 1)


def reuse_heap() -> None:
    """Let all threads share the C heap, which keeps up to 256 MiB of free memory and has room for arrays of up to 32 MiB, where
    the C library can. Otherwise glibc gives the memory of each large array back to the system and takes pages of zeros for
    the next one."""
    share_heap()
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_M_MMAP_THRESHOLD, 32 << 20)
        set_option(_M_TRIM_THRESHOLD, 256 << 20)


def trim_heap() -> None:
    """Give the C heap's free memory back to the system, where the C library can: glibc keeps what lies below memory in use.
    Takes some milliseconds."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


def _request_huge_pages(mapped: mmap.mmap) -> None:
    """Request huge pages for a large mapping. Linux maps a file with huge pages only where its page cache holds pieces of that
    size: where the file was written in such pieces, or is read after this call."""
    if len(mapped) >= 4 * _HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without transparent huge pages
            mapped.madvise(mmap.MADV_HUGEPAGE)


def _tensor_bytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a tensor of a safetensors file; raises KeyError for another dtype than those of an engine's weights, ValueError
    for a negative size."""
    sizes = [operator.index(size) for size in shape]
    if min(sizes, default=0) < 0:
        raise ValueError(f"shape {sizes}")
    return DTYPE_BYTES[dtype] * math.prod(sizes)


class WeightsFile:
    """The tensors of a safetensors file, mapped and never read here. Addresses are valid while this object lives.

    `header_digest` is the SHA-256 in hex of the header with its length.
    """

    def __init__(self, path: Path) -> None:
        """Map the file and check its header; raises `EngineError` when it is damaged or a tensor is not aligned."""
        self.path = path
        try:
            with open(path, "rb") as file:
                self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise EngineError("engine", f"file {path} is missing", remedy=_REMEDY) from None
        except ValueError as error:
            raise self._damaged(str(error)) from None
        _request_huge_pages(self._mapped)
        self._bytes = np.frombuffer(self._mapped, np.uint8)
        self._offsets: dict[str, int] = {}
        self.sizes: dict[str, int] = {}
        self._read_header()

    @property
    def total_bytes(self) -> int:
        """Size of the file, header included."""
        return len(self._bytes)

    @property
    def contents(self) -> NDArray[np.uint8]:
        """The bytes of the file, header included."""
        return self._bytes

    def offset(self, name: str) -> int:
        """The byte of the file at which a tensor begins."""
        return self._offsets[name]

    def address(self, name: str) -> int:
        """The address of a tensor in memory."""
        return int(self._bytes.ctypes.data) + self._offsets[name]

    def release(self, name: str) -> None:
        """Give back the memory of a tensor's pages, which are read from the file again where they are used again."""
        start = -(-self._offsets[name] // mmap.PAGESIZE) * mmap.PAGESIZE
        size = (self._offsets[name] + self.sizes[name] - start) // mmap.PAGESIZE * mmap.PAGESIZE
        if size > 0 and hasattr(mmap, "MADV_DONTNEED"):
            self._mapped.madvise(mmap.MADV_DONTNEED, start, size)

    def require(self, names: Iterable[str], header: str) -> None:
        """Raise `EngineError` when the header's SHA-256 is not `header`, or one of these tensors is missing."""
        if self.header_digest != header:
            found, expected = f"SHA-256 {self.header_digest[:12]}…", f"{header[:12]}…"
            raise EngineError("engine", f"header of {self.path}", found=found, expected=expected, remedy=_REMEDY)
        missing = sorted(set(names) - set(self._offsets))
        if missing:
            found = f"{len(missing)} missing, the first of them {missing[0]}"
            raise EngineError("engine", f"tensors of {self.path}", found=found, remedy=_REMEDY)

    def _read_header(self) -> None:
        size = len(self._bytes)
        if size < 8:
            raise self._damaged(f"{size} bytes")
        (length,) = struct.unpack("<Q", self._mapped[:8])
        start = 8 + length
        if start > size:
            raise self._damaged(f"a header of {length} bytes in a file of {size}")
        self.header_digest = hashlib.sha256(self._mapped[:start]).hexdigest()
        try:
            header = parse_json(self._mapped[8:start])
            tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
            places = {name: tuple(map(operator.index, entry["data_offsets"])) for name, entry in tensors.items()}
            sizes = {name: _tensor_bytes(entry["dtype"], entry["shape"]) for name, entry in tensors.items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise self._damaged(f"a header that does not parse: {error}") from None
        end = 0
        for name, place in sorted(places.items(), key=lambda item: item[1]):
            if place != (end, end + sizes[name]):
                found = f"tensor {name} of {sizes[name]} bytes at bytes {' to '.join(map(str, place))}"
                raise self._damaged(f"{found}, where byte {end} comes next")
            if (start + end) % ALIGNMENT:
                raise self._damaged(f"tensor {name} at byte {start + end}, not a multiple of {ALIGNMENT}")
            self._offsets[name], self.sizes[name] = start + end, sizes[name]
            end += sizes[name]
        if start + end != size:
            raise self._damaged(f"{size} bytes, of which the header explains {start + end}")

    def _damaged(self, found: str) -> EngineError:
        return EngineError("engine", f"weights {self.path}", found=found, expected="aligned safetensors", remedy=_REMEDY)
