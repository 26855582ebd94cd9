"""Compiles kernels into one shared library per instruction set."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

import tvm
from tvm.support import cc

from compiler.backends.tvm.isa import Isa
from compiler.backends.tvm.kernels.base import Kernel
from compiler.errors import CompileError


def compile_library(kernels: Iterable[Kernel], isa: Isa) -> bytes:
    """The bytes of a .so that exports every kernel under its name; equal kernels give equal bytes."""
    if cc.get_cc() is None:
        remedy = "install one, as with `apt install gcc`, or name it in the environment variable CC"
        raise CompileError("tvm", "no C compiler to link the kernels with", remedy=remedy)
    functions = {kernel.name: kernel.build(isa) for kernel in sorted(kernels, key=lambda kernel: kernel.name)}
    # Without storage rewriting, scratch stays where `tir.local` puts it: on the stack of its task.
    with tvm.transform.PassContext(config={"tirx.disable_storage_rewrite": True}):
        executable = tvm.compile(tvm.IRModule(functions), target=tvm.target.Target(isa.target()))
    with tempfile.TemporaryDirectory(prefix="belle-kernels-") as folder:
        path = Path(folder) / "kernels.so"
        executable.export_library(str(path))
        return path.read_bytes()
