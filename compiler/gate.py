"""The accuracy that an engine must keep, and the error of a build whose engine does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from belle_compile.compiler.accuracy import Accuracy, Sample, measure
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.ranked_engine import RankedEngine
from belle_compile.runtime.engine import Engine
from belle_compile.runtime.errors import EngineError


@dataclass(frozen=True)
class Gate:
    """The limits that an engine must keep. A limit without a measurement (no expected answers) is not applied."""

    max_perplexity_ratio: float = 1.01
    min_top1: float = 0.95
    min_accuracy_kept: float = 0.98

    def misses(self, accuracy: Accuracy) -> list[tuple[str, str]]:
        """The measured value and the limit, as text, for each limit that is missed."""
        kept = accuracy.accuracy_kept
        judged = [
            (not accuracy.perplexity_ratio <= self.max_perplexity_ratio,  # NaN is a miss
             f"perplexity ratio {accuracy.perplexity_ratio:.4f}", f"at most {self.max_perplexity_ratio:g}"),
            (not accuracy.top1_agreement >= self.min_top1,
             f"top-1 agreement {accuracy.top1_agreement:.4f}", f"at least {self.min_top1:g}"),
            (kept is not None and not kept >= self.min_accuracy_kept,
             f"share of accuracy kept {kept or 0:.4f}", f"at least {self.min_accuracy_kept:g}"),
        ]  # fmt: skip
        return [(found, expected) for missed, found, expected in judged if missed]

    def judge(
        self,
        directory: Path,
        ranks: int,
        model: ir.Model,
        holdout: Sequence[Sample],
        folder: Path,
        worst: list[str],
        on_progress: Callable[[int, int], None],
    ) -> Accuracy:
        """Run the held-out requests through the engine on `ranks` ranks and through the unquantized model, and compare.

        Raises CompileError if a limit is missed, naming the `worst` layers, or if the engine cannot run on this host."""
        try:
            engine = Engine.load(directory) if ranks == 1 else RankedEngine(directory, ranks)
        except EngineError as error:
            raise CompileError(
                "gate", "the engine cannot run on this host", found=str(error).removesuffix("."),
                remedy="build where it can, or with --no-gate",
            ) from error  # fmt: skip
        with engine:
            accuracy = measure(engine, model, holdout, folder, on_progress=on_progress)
        if misses := self.misses(accuracy):
            raise self._missed(accuracy, misses, worst)
        return accuracy

    def _missed(self, accuracy: Accuracy, misses: list[tuple[str, str]], worst: list[str]) -> CompileError:
        look = f"look at {', '.join(worst)}; " if worst else ""
        return CompileError(
            "gate",
            f"the engine is too far from the unquantized model over {accuracy.requests} held-out requests",
            found=", ".join(found for found, _ in misses),
            expected=", ".join(expected for _, expected in misses),
            remedy=f"{look}build with --quant int8-accurate, or with more calibration requests, or set other limits",
        )

    def to_plain(self) -> dict[str, Any]:
        """The limits as the manifest holds them."""
        return dict(vars(self))


DEFAULT_GATE = Gate()
