"""Loads an engine directory built by belle-compile and answers prompts with it; needs neither compiler nor torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from belle_compile.runtime.errors import EngineError

if TYPE_CHECKING:
    from belle_compile.runtime.engine import Engine, Result
    from belle_compile.runtime.serving.sampling import SamplingParams

__all__ = ["Engine", "EngineError", "Result", "SamplingParams"]

_HOMES = {
    "Engine": "belle_compile.runtime.engine",
    "Result": "belle_compile.runtime.engine",
    "SamplingParams": "belle_compile.runtime.serving.sampling",
}


def __getattr__(name: str) -> Any:
    """Import on first use: the compiler reads `runtime.artifact` without paying for numpy and tokenizers."""
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
