"""The limits of the accuracy gate, and the error of a build whose engine misses one. `compiler.judging` runs the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from belle_compile.compiler.errors import CompileError

if TYPE_CHECKING:
    from belle_compile.compiler.accuracy import Accuracy

FEW_REQUESTS = 32  # with fewer held-out requests, the error of a missed limit says that they are few


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

    def to_plain(self) -> dict[str, Any]:
        """The limits as the manifest holds them."""
        return dict(vars(self))

    def missed(
        self, accuracy: Accuracy, misses: Sequence[tuple[str, str]], worst: Sequence[str], size_budget: float, kept: str
    ) -> CompileError:
        """The error of a build whose engine misses limits. `worst` are the layers that quantization hurts most, `kept` says in
        words what stays of the build."""
        few = ", which are few" if accuracy.requests < FEW_REQUESTS else ""
        more = f" above {size_budget:g}" if size_budget > 1 else " 1.2"
        ways = [
            f"keep the layers that INT8 hurts most float32 with --size-budget{more}",
            "build with --quant int8-accurate",
            "give more requests to calibrate with" + (" and to hold out" if few else ""),
            "set other limits with --max-ppl-ratio, --min-top1 or --min-accuracy-kept",
        ]
        look = f"look at {', '.join(worst)}; " if worst else ""
        return CompileError(
            "gate",
            f"the engine is too far from the unquantized model over {accuracy.requests} held-out requests{few}",
            found=", ".join(found for found, _ in misses),
            expected=", ".join(expected for _, expected in misses),
            remedy=f"{look}{', '.join(ways[:-1])}, or {ways[-1]}; {kept}",
        )


DEFAULT_GATE = Gate()
