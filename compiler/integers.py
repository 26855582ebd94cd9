"""Integers that a checkpoint holds for its weights: whether a build keeps them, and the damage where it chooses others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

import onnx_ir as ir

from belle_compile.passes.presets import METHODS, Recipe
from belle_compile.passes.quantization.keep_integers import integers_of, refusal
from belle_compile.passes.quantization.rounding_error import ROUNDING_ERROR, RoundingError
from belle_compile.runtime.artifact import PassRecord

AGAIN = "quantize-again"  # the record of weights that were integers and became others
_DIGITS = 4  # of an error; a build on another processor may add up squares in another order


@dataclass(frozen=True)
class IntegerPlan:
    """What a recipe does with the integers of a checkpoint: the `recipe` to follow, the names of the linears that `kept`
    theirs, and for the others the reason, as a phrase."""

    recipe: Recipe
    kept: tuple[str, ...] = ()
    again: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for the manifest and the report."""
        notes = []
        if self.kept:
            without = f"; methods that change weights were left out: {', '.join(self.left_out)}" if self.left_out else ""
            notes.append(f"{len(self.kept)} linears keep the integers of the checkpoint{without}")
        for reason in dict.fromkeys(self.again.values()):
            names = [name for name, own in self.again.items() if own == reason]
            which = names[0] if len(names) == 1 else f"{len(names)} linears, from {names[0]} on,"
            notes.append(f"{which} {'is' if len(names) == 1 else 'are'} quantized again: {reason}")
        return tuple(notes)


def integer_plan(graph: ir.Model, recipe: Recipe, methods: Sequence[str] | None) -> IntegerPlan:
    """Decide what becomes of the integers that a checkpoint's graph has.

    They are kept where the layout of the recipe's weights can hold some; methods of a preset that change weights are then left
    out. Methods that were asked for (`methods`) are applied in any case.
    """
    if not recipe.quantizes:
        return IntegerPlan(recipe)
    held = {node: integers for node in graph.graph if (integers := integers_of(node)) is not None}
    reasons = {
        str(node.name): refusal(node, integers, recipe.weights, recipe.activation_bits) for node, integers in held.items()
    }
    kept = tuple(name for name, reason in reasons.items() if not reason)
    changing = tuple(name for name in recipe.methods if METHODS[name].changes_weights)
    if kept and changing and methods is not None:
        reason = f"--methods {','.join(changing)} changes the weights"
        return IntegerPlan(recipe, again={name: known or reason for name, known in reasons.items()})
    again = {name: reason for name, reason in reasons.items() if reason}
    if not kept:
        return IntegerPlan(recipe, again=again)
    return IntegerPlan(recipe.keeping_integers(), kept, again, changing)


def damage_record(graph: ir.Model) -> PassRecord | None:
    """The relative error of each weight that was integers in the checkpoint and got others, the largest first.

    `graph` is the quantized graph before it is divided; errors were measured when the weights were written. None if there are
    no such weights.
    """
    tensors = [value.const_value for value in graph.graph.initializers.values() if value.const_value is not None]
    measured: dict[str, RoundingError] = {
        str(tensor.name): tensor.meta[ROUNDING_ERROR] for tensor in tensors if ROUNDING_ERROR in tensor.meta
    }
    if not measured:
        return None
    errors = {name.partition(".weight")[0]: float(f"{error.value:.{_DIGITS}g}") for name, error in measured.items()}
    worst = dict(sorted(errors.items(), key=lambda item: (-item[1], item[0])))
    name = next(iter(worst))
    summary = (
        f"{len(worst)} weights were quantized again: relative error {median(worst.values()):.3g} in the median, "
        f"{worst[name]:.3g} in the worst, {name}"
    )
    return PassRecord(AGAIN, {"relative_errors": worst}, len(worst), (summary,))
