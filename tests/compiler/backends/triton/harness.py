"""Runs Triton kernels on NumPy arrays, interpreted: TRITON_INTERPRET=1 is set by tests/conftest.py before they are imported."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from triton.runtime import interpreter

from belle_compile.compiler.backends.program.kernel import View
from belle_compile.compiler.backends.triton.kernels.base import OVERLAP, Kernel
from belle_compile.runtime.program import Launch

Array = npt.NDArray[Any]
TORCH = {"int8": torch.int8, "int32": torch.int32, "float16": torch.float16, "float32": torch.float32}
RANDOM = np.random.default_rng(11)


def interpret(kernel: Kernel, rows: int, addresses: Sequence[int]) -> None:
    """Start a kernel for so many rows on memory at these addresses."""
    start = kernel.start()
    grid = Launch("", 32, 0, start.grid, start.rows, 0, 0, ()).blocks(rows)
    pointers = {
        f"{name}_ptr": torch.frombuffer((ctypes.c_uint8 * 16).from_address(address), dtype=TORCH[dtype])
        for (name, dtype), address in zip(kernel.pointers(), addresses, strict=True)
    }
    with language_patched_once():
        kernel.function[grid](**{**kernel.constants(), **pointers, OVERLAP: False})


@contextmanager
def language_patched_once() -> Iterator[None]:
    """The interpreter patches Triton's language at every call of a function from a kernel, which is a quarter of its time; once
    for each module whose functions a kernel calls is enough."""
    patch, patched = interpreter._patch_lang, set()

    def patch_once(function: Any) -> Any:
        if id(function.__globals__) in patched:
            return interpreter._LangPatchScope()
        patched.add(id(function.__globals__))
        return patch(function)

    interpreter._patch_lang = patch_once
    try:
        yield
    finally:
        interpreter._patch_lang = patch


def call(kernel: Kernel, rows: int, *arrays: Array, launched: int | None = None) -> None:
    """Run a kernel for `rows` rows on arrays in the order of its pointers behind the row count; of `launched` rows, the grid's,
    those beyond must not be touched. Zeroed workspaces must be zeros again."""
    work = [np.zeros(w.bytes, np.uint8) if w.zeroed else np.full(w.bytes, 0x7F, np.uint8) for w in kernel.workspaces()]
    given = [np.array([rows] * 4, np.int32), *arrays, *work]
    for (name, dtype), array in zip(kernel.pointers(), given, strict=True):
        assert array.flags.c_contiguous, name
        assert array.dtype == np.uint8 or array.dtype == dtype, f"{name}: {array.dtype}, declared {dtype}"
    interpret(kernel, rows if launched is None else launched, [array.ctypes.data for array in given])
    for workspace, memory in zip(kernel.workspaces(), work, strict=True):
        assert not workspace.zeroed or not memory.any(), "a workspace is not zeros again"


def garbage(shape: int | tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> Array:
    """Memory that nobody should read: NaN, or 99 in integers."""
    return np.full(shape, np.nan if np.issubdtype(dtype, np.floating) else 99, dtype)


def place(rows: Array, view: View, extra: int = 0) -> Array:
    """A buffer that holds `rows` where `view` says, garbage elsewhere and in `extra` rows behind."""
    buffer = garbage((len(rows) + extra, view.stride), rows.dtype)
    buffer[: len(rows), view.offset : view.offset + rows.shape[1]] = rows
    return buffer


def taken(buffer: Array, view: View, rows: int, width: int) -> Array:
    """What lies where `view` says."""
    return buffer[:rows, view.offset : view.offset + width]


def floats(*shape: int) -> npt.NDArray[np.float32]:
    """Normal numbers."""
    return RANDOM.normal(size=shape).astype(np.float32)
