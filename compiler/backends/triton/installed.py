"""The check that Triton, an optional dependency, is installed."""

from __future__ import annotations

from importlib.util import find_spec

from belle_compile.compiler.errors import CompileError
from belle_compile.runtime.errors import install


def require_triton() -> None:
    """Raise CompileError if Triton is not installed."""
    if find_spec("triton") is None:
        remedy = f"{install('gpu')} on Linux"
        raise CompileError("triton", "the Python package triton is not installed", remedy=remedy)
