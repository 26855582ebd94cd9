"""Compile kernels into one shared library for each instruction set."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import tvm
from tvm.support import cc

from belle_compile.compiler.backends.tvm.isa import Isa
from belle_compile.compiler.backends.tvm.kernels.base import Kernel
from belle_compile.compiler.backends.tvm.kernels.quantized_linear import QuantizedLinear
from belle_compile.compiler.backends.tvm.tuning.table import Shape, TilingTable
from belle_compile.compiler.errors import CompileError

NATIVE = Path(__file__).parent / "native"  # C sources that run the calls of a step, compiled into every library
_FLAGS = ("-x", "c", "-std=gnu11", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")


def compile_library(kernels: Iterable[Kernel], isa: Isa, tilings: TilingTable | None = None, source: str = "") -> bytes:
    """The bytes of a .so that exports every kernel under its name; equal kernels and tilings give equal bytes.

    Kernels get the tiling that `tilings` has for their shape. Names do not depend on the instruction set or the tiling. The
    library also has what the C `source` defines, which may call the kernels.
    """
    if tilings is not None:
        kernels = [tiled(kernel, tilings) for kernel in kernels]
    return compile_functions(
        {kernel.name: kernel.build(isa) for kernel in sorted(kernels, key=lambda kernel: kernel.name)}, isa, source
    )


def compile_functions(functions: Mapping[str, tvm.tirx.PrimFunc], isa: Isa, source: str = "") -> bytes:
    """The bytes of a .so that exports functions by name, and the C functions by which runtime/executors/native.py calls them,
    and what another C `source` defines.

    Raises CompileError if there is no C compiler or it fails.
    """
    compiler = _c_compiler()
    # Without TVM's storage rewriting, scratch memory stays where `tir.local` puts it: on the stack of its task.
    with tvm.transform.PassContext(config={"tirx.disable_storage_rewrite": True}):
        executable = tvm.compile(tvm.IRModule(dict(functions)), target=tvm.target.Target(isa.target()))
    with tempfile.TemporaryDirectory(prefix="belle-kernels-") as folder:
        path = Path(folder) / "kernels.so"
        texts = {file.name: file.read_text(encoding="utf-8") for file in sorted(NATIVE.glob("*.c"))}
        texts |= {"source.c": source} if source else {}
        objects = [_compile_c(compiler, name, text, Path(folder)) for name, text in texts.items()]
        executable.export_library(str(path), addons=objects)
        return path.read_bytes()


def _compile_c(compiler: str, name: str, text: str, folder: Path) -> str:
    """Compile a C source in `folder`; returns the path of the object file."""
    made = folder / f"{Path(name).stem}.o"
    # From standard input, so that __FILE__ is the same in every build
    command = [compiler, *_FLAGS, "-I", str(NATIVE), "-c", "-", "-o", str(made)]
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line]
        found = errors[0] if errors else f"exit code {done.returncode}"
        remedy = "name a recent gcc or clang in the environment variable CC"
        raise CompileError("tvm", f"{compiler} does not compile {name}", found=found, remedy=remedy)
    return str(made)


def compiler_version() -> str:
    """The first line that the C compiler prints for --version, or "unknown"."""
    done = subprocess.run([_c_compiler(), "--version"], capture_output=True, text=True)
    return done.stdout.partition("\n")[0].strip() or "unknown"


def _c_compiler() -> str:
    compiler: str | None = cc.get_cc()
    if compiler is None:
        remedy = "install one, for example with `apt install gcc`, or name it in the environment variable CC"
        raise CompileError("tvm", "no C compiler to link the kernels with", remedy=remedy)
    return compiler


def tiled(kernel: Kernel, tilings: TilingTable) -> Kernel:
    """The kernel with the measured tiling of its shape or of the nearest one. A kernel that already has a tiling keeps it."""
    if not isinstance(kernel, QuantizedLinear) or kernel.tiling is not None:
        return kernel
    entry = tilings.find(Shape.of(kernel))
    return replace(kernel, tiling=entry.tiling) if entry else kernel
