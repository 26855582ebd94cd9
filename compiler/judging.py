"""Run a new engine on held-out requests beside the unquantized model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import onnx_ir as ir

from belle_compile.compiler.accuracy import Accuracy, Sample, measure
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.ranked_engine import RankedEngine
from belle_compile.runtime.engine import Engine
from belle_compile.runtime.errors import EngineError


def accuracy_of(
    directory: Path,
    ranks: int,
    model: ir.Model,
    holdout: Sequence[Sample],
    folder: Path,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Accuracy:
    """Run the held-out requests through the engine on `ranks` ranks and through the unquantized model, and compare.

    Raises CompileError if the engine cannot run on this host."""
    try:
        engine = Engine.load(directory) if ranks == 1 else RankedEngine(directory, ranks)
    except EngineError as error:
        raise CompileError(
            "gate", "the engine cannot run on this host", found=str(error).removesuffix("."),
            remedy="build where it can, or with --no-gate",
        ) from error  # fmt: skip
    with engine:
        return measure(engine, model, holdout, folder, on_progress=on_progress)
