"""Presets and methods of quantization: one record each, from which everything that names them is derived.

The choices and the help of the command line, the manifest's words, error messages and the tables in the documentation come
from here; `passes.pipeline` turns a recipe into passes. This module imports neither onnx_ir nor torch nor NumPy, because the
command line reads it at every start.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from belle_compile.compiler.errors import CompileError
from belle_compile.passes.quantization.scheme import BLOCK, FLOAT32, INT4, INT8, INT8_BLOCKS, WeightScheme

__all__ = [
    "BLOCK",
    "DEFAULT_PRESET",
    "INT8",
    "INT8_BLOCKS",
    "METHODS",
    "PRESETS",
    "UNQUANTIZED",
    "Method",
    "Preset",
    "Recipe",
    "WeightScheme",
    "activation_words",
    "find_preset",
    "manifest_words",
    "recipe_of",
]

_STAGE = "quantization"


@dataclass(frozen=True)
class Method:
    """A way to make quantized models more accurate.

    `summary` is for the command line's help, `description` for the documentation. `manifest` is the key and the text that the
    manifests of engines with this method have. A method with `needs_requests` is applied in calibrated builds only. One that
    `changes_weights` gives weights other values before they are rounded, so that integers of a checkpoint cannot be kept.
    """

    name: str
    summary: str
    description: str
    manifest: tuple[str, str]
    needs_requests: bool = False
    changes_weights: bool = False


@dataclass(frozen=True)
class Recipe:
    """What a build does to a model: how weights are stored, the bits of activations (32 for float32), and names of methods.

    With `keeps_integers`, weights that the checkpoint holds as integers keep these where they can be stored so."""

    weights: WeightScheme = INT8
    activation_bits: int = 8
    methods: tuple[str, ...] = ()
    keeps_integers: bool = False

    @property
    def quantizes(self) -> bool:
        """Whether linear layers compute with integers."""
        return self.weights.quantizes

    def methods_used(self, calibrated: bool) -> tuple[str, ...]:
        """The methods that are applied: without requests (`calibrated` False), those that need none."""
        return tuple(name for name in self.methods if calibrated or not METHODS[name].needs_requests)

    def keeping_integers(self) -> Recipe:
        """The recipe that keeps the integers of a checkpoint, with only those of its methods that do not change weights."""
        methods = tuple(name for name in self.methods if not METHODS[name].changes_weights)
        return replace(self, methods=methods, keeps_integers=True)

    def applied(self, calibrated: bool) -> Recipe:
        """The recipe with only those of its methods that are applied."""
        return replace(self, methods=self.methods_used(calibrated))


UNQUANTIZED = Recipe(FLOAT32, 32)


@dataclass(frozen=True)
class Preset:
    """A recipe with a name. `summary` is for the command line's help, `description` for the documentation."""

    name: str
    summary: str
    description: str
    recipe: Recipe


# In the order in which recipes list them.
METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method(
            "reorder",
            "channels of similar size beside each other",
            "Channels of the residual stream and of the feed-forward are sorted by the size of their activations, at no cost "
            "at run time, so that values that share a scale are of similar size: for formats with scales of blocks of inputs.",
            manifest=("order of channels", "sorted by the size of activations"),
            needs_requests=True,
            changes_weights=True,
        ),
        Method(
            "smooth",
            "SmoothQuant",
            "SmoothQuant: outliers of activations move into the weights, channel by channel.",
            manifest=("smoothing", "outliers of activations moved into weights, channel by channel"),
            needs_requests=True,
            changes_weights=True,
        ),
        Method(
            "rotate",
            "rotations that are folded into the weights",
            "Rotations R1 and R2 of the residual stream and of the attention's values, folded into the weights: they cost "
            "nothing at run time.",
            manifest=("rotations", "residual stream and values, folded into the weights"),
            changes_weights=True,
        ),
        Method(
            "rotate-online",
            "a rotation of the feed-forward activations at run time",
            "Rotation R4 of the feed-forward activations, computed in every step, because no weight can absorb it.",
            manifest=("online rotations", "feed-forward activations, while running"),
            changes_weights=True,
        ),
        Method(
            "gptq",
            "weights rounded by requests",
            "GPTQ: weights are rounded so that outputs on the calibration requests change least.",
            manifest=("rounding", "by calibration requests (GPTQ)"),
            needs_requests=True,
        ),
        Method(
            "static",
            "one scale for the activations of all tokens",
            "The activations that a linear layer reads have one scale for all tokens, chosen by calibration requests, in "
            "place of a scale for each token.",
            manifest=("clipping", "of activations, by calibration requests"),
            needs_requests=True,
        ),
    )
}

PRESETS: Mapping[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "int8",
            "weights per output channel and activations per token in INT8, with rotations",
            "For most models.",
            Recipe(INT8, 8, ("rotate", "rotate-online", "gptq")),
        ),
        Preset(
            "int8-accurate",
            "as int8 with activations of 16 bits, for more accuracy at more arithmetic",
            "For models that lose too much with activations of 8 bits; prefill takes more arithmetic.",
            Recipe(INT8, 16, ("rotate", "gptq")),
        ),
        Preset(
            "int8-plain",
            "as int8 without rotations",
            "To see what rotations and GPTQ are worth.",
            Recipe(INT8, 8),
        ),
        Preset(
            "int4",
            f"weights of the layers in INT4 with a scale for every {INT4.group} inputs, half the memory for some accuracy",
            "For half the memory, at some loss of accuracy.",
            Recipe(INT4, 8, ("rotate", "rotate-online", "gptq")),
        ),
        Preset(
            "none",
            "float32, for comparison",
            "For comparison: nothing is quantized.",
            UNQUANTIZED,
        ),
    )
}
DEFAULT_PRESET = "int8"


def find_preset(name: str) -> Preset:
    """Look up a preset; raises CompileError where there is none of that name."""
    if name not in PRESETS:
        raise CompileError(_STAGE, "unknown preset", found=repr(name), expected=" or ".join(PRESETS))
    return PRESETS[name]


def recipe_of(preset: str, methods: Collection[str] | None, calibrated: bool) -> Recipe:
    """The recipe of a preset, with `methods` in place of the preset's own unless that is None.

    Raises CompileError for an unknown preset or method, for methods of a preset that quantizes nothing, and for methods that
    need requests where there are none.
    """
    recipe = find_preset(preset).recipe
    if methods is None:
        return recipe
    if unknown := [name for name in methods if name not in METHODS]:
        raise CompileError(_STAGE, "unknown method", found=", ".join(unknown), expected=f"some of {', '.join(METHODS)}")
    if methods and not recipe.quantizes:
        raise CompileError(_STAGE, "methods", found=", ".join(methods), expected=f"none with --quant {preset}")
    needing = [name for name in methods if METHODS[name].needs_requests]
    if needing and not calibrated:
        what, remedy = f"method {', '.join(needing)}", "give some with --calibration"
        raise CompileError(_STAGE, what, found="no requests to calibrate with", remedy=remedy)
    return replace(recipe, methods=tuple(name for name in METHODS if name in methods))


def manifest_words(recipe: Recipe, calibrated: bool) -> dict[str, Any]:
    """The entries on weights, activations and methods in the manifest, apart from the records of the passes."""
    if not recipe.quantizes:
        return {"scheme": "none", "weights": str(recipe.weights), "activations": activation_words(recipe, ())}
    used = recipe.methods_used(calibrated)
    kept = {"integers": "those of the checkpoint, where weights can be stored so"} if recipe.keeps_integers else {}
    return (
        {
            "scheme": f"w{recipe.weights.bits}a{recipe.activation_bits}",
            "weights": str(recipe.weights),
            "activations": activation_words(recipe, used),
        }
        | kept
        | dict(METHODS[name].manifest for name in used)
    )


def activation_words(recipe: Recipe, used: Sequence[str]) -> str:
    """The type of the activations and the origin of their scales, for a recipe of which the methods `used` are applied."""
    if not recipe.quantizes:
        return "float32"
    integers = "16 bits as two int8 planes" if recipe.activation_bits == 16 else f"int{recipe.activation_bits}"
    return f"{integers}, one scale {'for all tokens' if 'static' in used else 'a token, found while running'}"
