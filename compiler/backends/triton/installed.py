"""Whether Triton can be used here: it is an extra of its own."""

from __future__ import annotations

from importlib.util import find_spec

from belle_compile.compiler.errors import CompileError


def require_triton() -> None:
    """Raise CompileError where Triton is not installed."""
    if find_spec("triton") is None:
        remedy = "pip install 'belle-compile[gpu]' on Linux"
        raise CompileError("triton", "the Python package triton is not installed", remedy=remedy)
