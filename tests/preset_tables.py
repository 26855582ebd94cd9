"""The presets and methods of the registries as tables, for the documentation."""

from __future__ import annotations

from collections.abc import Sequence

from belle_compile.passes.pipeline import PIPELINE
from belle_compile.passes.presets import DEFAULT_PRESET, METHODS, PRESETS, activation_words


def markdown() -> str:
    """A table of presets and one of methods, with how they belong together."""
    return f"""{_presets()}

Methods that need requests are applied only where a build has some: with `--calibration`, or those that a model writes.

{_methods()}
"""


def _presets() -> str:
    rows = []
    for preset in PRESETS.values():
        name = f"`{preset.name}`" + (" (default)" if preset.name == DEFAULT_PRESET else "")
        recipe = preset.recipe
        methods = ", ".join(f"`{method}`" for method in recipe.methods)
        rows.append((name, str(recipe.weights), activation_words(recipe, ()), methods, preset.description))
    return _table(("`--quant`", "weights", "activations", "methods", "what it is for"), rows)


def _methods() -> str:
    rows = []
    for method in METHODS.values():
        passes = [object.__new__(step.pass_class) for step in PIPELINE if step.used_by == method.name]
        names = ", ".join(f"`{each.name}`" for each in passes)
        rows.append((f"`{method.name}`", method.description, "yes" if method.needs_requests else "no", names))
    return _table(("`--methods`", "what it does", "needs requests", "passes"), rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
