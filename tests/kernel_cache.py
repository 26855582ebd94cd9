"""Libraries that a run of the tests has compiled: the same functions are not compiled again by another test or worker.

Tests build engines of a few small models many times over, and LLVM takes most of that time. What is compiled is looked up by
all that it depends on: the functions as TVM writes them, the instruction set, the C compiler and the source of what walks
calls.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

FOLDER = "BELLE_TEST_KERNELS"  # environment variable; empty or unset: everything is compiled


def install() -> None:
    """Have `compile_functions` look first, from now on in this process."""
    tvm = pytest.importorskip("tvm")
    from belle_compile.compiler.backends.tvm import library

    compile_functions = library.compile_functions
    if hasattr(compile_functions, "compiles"):
        return

    def look_first(functions: Mapping[str, Any], isa: Any, source: str = "") -> bytes:
        if not os.environ.get(FOLDER):
            return compile_functions(functions, isa, source)
        native = b"".join(source.read_bytes() for source in sorted(library.NATIVE.iterdir()))
        depends = hashlib.sha256(f"{isa!r} {library._c_compiler()} {library._FLAGS}{source}".encode() + native)
        for name, function in sorted(functions.items()):
            depends.update(f"\0{name}\0{tvm.ir.save_json(function)}".encode())
        file = Path(os.environ[FOLDER]) / depends.hexdigest()
        if not file.is_file():
            partial = file.with_suffix(f".{os.getpid()}")
            partial.write_bytes(compile_functions(functions, isa, source))
            partial.replace(file)
        return file.read_bytes()

    look_first.compiles = compile_functions  # type: ignore[attr-defined]
    library.compile_functions = look_first
