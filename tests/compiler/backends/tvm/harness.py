"""Runs kernels on NumPy arrays: one library per instruction set, aligned buffers, rows placed by views."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from belle_compile.compiler.backends.program.kernel import View
from belle_compile.compiler.backends.tvm.isa import AMX, AVX2, AVX512VNNI, Isa
from belle_compile.compiler.backends.tvm.kernels.base import Kernel
from belle_compile.compiler.backends.tvm.library import compile_library
from belle_compile.runtime.executors.native import CallList, KernelLibrary, ThreadPool
from belle_compile.runtime.host import host_isas

Array = npt.NDArray[Any]
HOST_ISAS = tuple(isa for isa in (AVX2, AVX512VNNI) if isa.name in host_isas())
ALL_ISAS = (AVX2, AVX512VNNI, AMX)


def aligned(shape: int | tuple[int, ...], dtype: npt.DTypeLike, fill: Any = 0) -> Array:
    """An array whose memory starts at a multiple of 64 bytes."""
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.zeros(size + 64, np.uint8)
    offset = -memory.ctypes.data % 64
    array = memory[offset : offset + size].view(dtype).reshape(shape)
    array[...] = fill
    return array


def aligned_copy(values: npt.ArrayLike, dtype: npt.DTypeLike | None = None) -> Array:
    """The same values in aligned memory."""
    values = np.asarray(values, dtype)
    return aligned(values.shape, values.dtype, values)


def ints(*values: int) -> Array:
    """An aligned int32 vector."""
    return aligned_copy(values, np.int32)


def garbage(shape: int | tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> Array:
    """Aligned memory that nobody should read: NaN, or 99 in integers."""
    return aligned(shape, dtype, np.nan if np.issubdtype(dtype, np.floating) else 99)


def place(rows: Array, view: View) -> Array:
    """A buffer that holds `rows` where `view` says, garbage elsewhere."""
    buffer = garbage((len(rows), view.stride), rows.dtype)
    buffer[:, view.offset : view.offset + rows.shape[1]] = rows
    return buffer


class Library:
    """Kernels compiled for one instruction set, when first called."""

    def __init__(self, kernels: Iterable[Kernel], isa: Isa) -> None:
        self.kernels, self.isa = tuple(dict.fromkeys(kernels)), isa

    @cached_property
    def file(self) -> Path:
        """The shared library."""
        self.folder = tempfile.TemporaryDirectory(prefix="belle-test-kernels-")
        path = Path(self.folder.name) / "kernels.so"
        path.write_bytes(compile_library(self.kernels, self.isa))
        return path

    @cached_property
    def loaded(self) -> tuple[KernelLibrary, ThreadPool]:
        """The library, and threads enough that some of them find nothing to do."""
        library = KernelLibrary(self.file)
        return library, ThreadPool(library, 3)

    def call(self, kernel: Kernel, *arrays: Array) -> None:
        """Run a kernel on arrays in the order of its pointers; dtypes must be the declared ones."""
        assert kernel in self.kernels, f"{kernel.name} was not compiled into this library"
        pointers = kernel.pointers()
        assert len(arrays) == len(pointers), f"{kernel.name} takes {[name for name, _ in pointers]}"
        for array, (name, dtype) in zip(arrays, pointers, strict=True):
            assert array.itemsize == np.dtype(dtype).itemsize or array.dtype == np.uint8, (name, array.dtype, dtype)
            assert array.ctypes.data % 64 == 0 and array.flags.c_contiguous, f"{name} is not aligned and contiguous"
        library, pool = self.loaded
        CallList(pool, [(library.address(kernel.name), [array.ctypes.data for array in arrays])]).run()
