"""Compiles BELLE checkpoints to inference engines, and runs them.

`compiler`, `passes` and `runtime` below this package are links to the folders of these names at the top of the repository.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from belle_compile.compiler.driver import BuildRequest, build
    from belle_compile.runtime.engine import Engine, Result
    from belle_compile.runtime.errors import BelleError, EngineError
    from belle_compile.runtime.serving.grammar.source import Grammar
    from belle_compile.runtime.serving.request import SamplingParams
    from belle_compile.runtime.serving.result_cache.options import CachePolicy, ResultCacheOptions
    from belle_compile.runtime.serving.scheduling import DeadlineExceeded, QueueFull, Scheduling

__version__ = "0.1.0"

__all__ = [
    "BelleError",
    "BuildRequest",
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
    "__version__",
    "build",
]

_OF_THE_COMPILER = ("BuildRequest", "build")


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that a serving host needs neither the compiler nor torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "belle_compile.compiler.driver" if name in _OF_THE_COMPILER else "belle_compile.runtime"
    return getattr(importlib.import_module(module), name)
