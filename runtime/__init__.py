"""Loads engine directories built by belle-compile and answers prompts with them. Needs neither the compiler nor torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from belle_compile.runtime.errors import BelleError, EngineError

if TYPE_CHECKING:
    from belle_compile.runtime.engine import Engine, Result
    from belle_compile.runtime.serving.grammar.source import Grammar
    from belle_compile.runtime.serving.request import SamplingParams
    from belle_compile.runtime.serving.result_cache.options import CachePolicy, ResultCacheOptions
    from belle_compile.runtime.serving.scheduling import DeadlineExceeded, QueueFull, Scheduling

__all__ = [
    "BelleError",
    "CachePolicy",
    "DeadlineExceeded",
    "Engine",
    "EngineError",
    "Grammar",
    "QueueFull",
    "Result",
    "ResultCacheOptions",
    "SamplingParams",
    "Scheduling",
]

_MODULE_OF = {
    "CachePolicy": "belle_compile.runtime.serving.result_cache.options",
    "DeadlineExceeded": "belle_compile.runtime.serving.scheduling",
    "Engine": "belle_compile.runtime.engine",
    "Grammar": "belle_compile.runtime.serving.grammar.source",
    "QueueFull": "belle_compile.runtime.serving.scheduling",
    "Result": "belle_compile.runtime.engine",
    "ResultCacheOptions": "belle_compile.runtime.serving.result_cache.options",
    "SamplingParams": "belle_compile.runtime.serving.request",
    "Scheduling": "belle_compile.runtime.serving.scheduling",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use: the compiler imports `runtime.artifact` without loading NumPy and tokenizers."""
    if name in _MODULE_OF:
        import importlib

        return getattr(importlib.import_module(_MODULE_OF[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
