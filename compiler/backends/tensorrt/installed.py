"""The check that TensorRT for RTX, an optional dependency, is installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from belle_compile.compiler.errors import CompileError
from belle_compile.runtime.errors import install
from belle_compile.runtime.executors.tensorrt_plan import PACKAGE, STAGE


def require_tensorrt() -> str:
    """The installed version of TensorRT for RTX: plans run with no other one. Raises CompileError where there is none."""
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        raise CompileError(STAGE, f"the Python package {PACKAGE} is not installed", remedy=install("tensorrt")) from None
