"""What a CPU kernel is: a description that can write its TIR for one instruction set."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import tvm

from belle_compile.compiler.backends.program import kernel
from belle_compile.compiler.backends.program.kernel import ROW_ALIGNMENT, View, round_up
from belle_compile.compiler.backends.tvm.isa import Isa
from belle_compile.compiler.backends.tvm.kernels.tiling import LINE
from belle_compile.compiler.backends.tvm.tir import Buffer, prim_func


def rows_apart(width: int, itemsize: int = 4) -> View:
    """A buffer of its own for rows of `width` elements: an odd number of cache lines from each to the next, because those that
    are a power of two apart would share few places of a cache."""
    stride = round_up(width, ROW_ALIGNMENT)
    lines = stride * itemsize // LINE
    return View(stride + (lines % 2 == 0) * (LINE // itemsize))


@dataclass(frozen=True)
class Kernel(kernel.Kernel):
    """A kernel as TIR."""

    @abstractmethod
    def body(self, isa: Isa, *buffers: Buffer) -> None:
        """Emit the statements of the kernel."""

    def build(self, isa: Isa, name: str | None = None) -> tvm.tirx.PrimFunc:
        """The kernel's TIR for one instruction set, under its own name or another."""
        return prim_func(name or self.name, self.pointers(), lambda *buffers: self.body(isa, *buffers))
