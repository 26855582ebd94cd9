"""The base of CPU kernels: a description that emits its TIR for one instruction set."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import tvm

from belle_compile.compiler.backends.program import kernel
from belle_compile.compiler.backends.program.kernel import ROW_ALIGNMENT, View, round_up
from belle_compile.compiler.backends.tvm.isa import Isa
from belle_compile.compiler.backends.tvm.kernels.tiling import LINE
from belle_compile.compiler.backends.tvm.tir import Buffer, prim_func


def rows_apart(width: int, itemsize: int = 4) -> View:
    """The view of a buffer for rows of `width` elements, which start an odd number of cache lines apart: rows a power of two
    apart would compete for few sets of a cache."""
    stride = round_up(width, ROW_ALIGNMENT)
    lines = stride * itemsize // LINE
    return View(stride + (lines % 2 == 0) * (LINE // itemsize))


@dataclass(frozen=True)
class Kernel(kernel.Kernel):
    """A kernel in TIR; quantized activations are uint8, int8 + 128."""

    byte = "uint8"

    @abstractmethod
    def body(self, isa: Isa, *buffers: Buffer) -> None:
        """Emit the statements of the kernel; there is one buffer for each of `pointers`."""

    def named(self, buffers: Sequence[Buffer]) -> dict[str, Buffer]:
        """The buffers by the names of their pointers."""
        return dict(zip((name for name, _ in self.pointers()), buffers, strict=True))

    def build(self, isa: Isa, name: str | None = None) -> tvm.tirx.PrimFunc:
        """The kernel's TIR for one instruction set, under its own name or another."""
        return prim_func(name or self.name, self.pointers(), lambda *buffers: self.body(isa, *buffers))
