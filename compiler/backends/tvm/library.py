"""Compiles kernels into one shared library per instruction set."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import tvm
from tvm.support import cc

from compiler.backends.tvm.isa import Isa
from compiler.backends.tvm.kernels.base import Kernel
from compiler.backends.tvm.kernels.quantized_linear import QuantizedLinear
from compiler.backends.tvm.tuning.table import Shape, TilingTable
from compiler.errors import CompileError


def compile_library(kernels: Iterable[Kernel], isa: Isa, tilings: TilingTable | None = None) -> bytes:
    """The bytes of a .so that exports every kernel under its name; equal kernels and tilings give equal bytes.

    Names are the same for every instruction set; what `tilings` has for a kernel's shape differs from one to the next.
    """
    if tilings is not None:
        kernels = [_tiled(kernel, tilings) for kernel in kernels]
    return compile_functions(
        {kernel.name: kernel.build(isa) for kernel in sorted(kernels, key=lambda kernel: kernel.name)}, isa
    )


def compile_functions(functions: Mapping[str, tvm.tirx.PrimFunc], isa: Isa) -> bytes:
    """The bytes of a .so that exports functions by name."""
    if cc.get_cc() is None:
        remedy = "install one, as with `apt install gcc`, or name it in the environment variable CC"
        raise CompileError("tvm", "no C compiler to link the kernels with", remedy=remedy)
    # Without storage rewriting, scratch stays where `tir.local` puts it: on the stack of its task.
    with tvm.transform.PassContext(config={"tirx.disable_storage_rewrite": True}):
        executable = tvm.compile(tvm.IRModule(dict(functions)), target=tvm.target.Target(isa.target()))
    with tempfile.TemporaryDirectory(prefix="belle-kernels-") as folder:
        path = Path(folder) / "kernels.so"
        executable.export_library(str(path))
        return path.read_bytes()


def _tiled(kernel: Kernel, tilings: TilingTable) -> Kernel:
    """The kernel with the measured tiling of its shape, or of one near it; one that has a tiling keeps it."""
    if not isinstance(kernel, QuantizedLinear) or kernel.tiling is not None:
        return kernel
    found = tilings.find(Shape.of(kernel))
    return replace(kernel, tiling=found.tiling) if found else kernel
