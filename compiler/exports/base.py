"""The interface of export formats, what a format can carry, and the registry.

A new format is a subclass of `Format` and a call of `register`. Code outside of a format never branches on its name. This
module imports neither torch nor onnx_ir: the command line reads the registry before it knows that the arguments are right.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.exports.directory import STAGE
from belle_compile.passes.presets import INT8, INT8_BLOCKS, METHODS, PRESETS, Recipe, WeightScheme

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import Tensor

    from belle_compile.compiler.backends import Backend
    from belle_compile.compiler.exports.model import ExportedModel
    from belle_compile.compiler.exports.runtimes import ForeignRuntime


# Which weights of a linear share a scale: those of an output channel, as in engines, or neighbouring ones of it.
CHANNEL, BLOCK = "channel", "block"
GRANULARITIES: Mapping[str, WeightScheme] = {CHANNEL: INT8, BLOCK: INT8_BLOCKS}
# Options that not every format takes, by their fields of `ExportRequest`.
OPTIONS: Mapping[str, str] = {"keep_tied": "--keep-tied or --untie", "dtype": "--dtype"}


@dataclass(frozen=True)
class Carries:
    """What the files of a format can hold.

    `methods` are those of passes.presets whose results can be stored. `weights` and `activation_bits` are those of recipes that
    the format's runtimes compute as the recipe says (None: any). `refuses` gives the reason, as a phrase, why a recipe cannot
    be carried for what these do not say (empty: it can). `reasons` say why another method cannot be carried, and `substitutes`
    which methods take its place in a preset.
    """

    methods: frozenset[str]
    weights: WeightScheme | None = None
    activation_bits: int | None = None
    refuses: Callable[[Recipe], str] = lambda recipe: ""
    reasons: Mapping[str, str] = field(default_factory=dict)
    substitutes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def refusal(self, recipe: Recipe) -> str:
        """The reason, as a phrase, why a recipe cannot be exported; empty if it can. Methods are those that were asked for."""
        if reason := self.refuses(recipe):
            return reason
        if self.weights is not None and recipe.weights != self.weights:
            return f"{recipe.weights} weights, and the format holds {self.weights}"
        if self.activation_bits is not None and recipe.activation_bits != self.activation_bits:
            return (
                f"{recipe.activation_bits}-bit activations, and the format's runtimes compute with {self.activation_bits} bits"
            )
        missing = [self.method_refusal(name) for name in recipe.methods if name not in self.methods]
        return "; ".join(missing)

    def method_refusal(self, name: str) -> str:
        """The reason, as a phrase, why a method cannot be carried; empty if it can."""
        if name in self.methods:
            return ""
        return f"the method {name}, {self.reasons.get(name, 'which the format has no place for')}"


class Format(ABC):
    """A kind of checkpoint of other runtimes. `summary` is for the command line's help, and `runtimes` names who loads it.

    `backend` is the one whose builds make the graph that the format is written from, and whose engines hold the same weights as
    a file; None for a format that stores the modules of a graph which still has its model's architecture. With `integers`,
    linears have INT8 weights; `quantizes_tables` says whether the embedding and the head have too. `granularities` are those of
    the weights' scales that the format holds, keys of `GRANULARITIES`; the first is the default. `options` are the fields of
    `ExportRequest` among `OPTIONS` that the format takes. `default_dtype` is the type of tensors that keep floats (empty: 16
    bits, as the checkpoint has them). `keeps_tied` is the reason why a tied head stays so by default (empty: it gets a weight
    of its own where the residual stream is rotated). `smooths_instead` is the reason why a residual stream whose readers are
    smoothed is not rotated by default, though the head is not tied (empty: it is rotated). `activations` are the record's words
    on how runtimes round activations (empty: as the recipe says).
    """

    name: str
    summary: str
    runtimes: str
    carries: Carries
    integers: bool
    backend: Backend | None = None
    quantizes_tables: bool = False
    granularities: tuple[str, ...] = ()
    options: frozenset[str] = frozenset()
    default_dtype: str = ""
    keeps_tied: str = ""
    smooths_instead: str = ""
    activations: str = ""

    @abstractmethod
    def check_model(self, model: ExportedModel) -> None:
        """Raise CompileError for a model that the format or its runtimes have no place for: one of a checkpoint before it is
        transformed, or one of an engine."""

    @abstractmethod
    def write(self, model: ExportedModel, folder: Path, on_progress: Callable[[int, int], None]) -> dict[str, Any]:
        """Write the files of a transformed model into `folder`; returns the names of files with `weights`, and `notes`.
        `on_progress` is called with the bytes of weights written so far and in all."""

    @abstractmethod
    def stored_bytes(self, model: ExportedModel) -> int:
        """The bytes that the weights of a transformed model take on disk."""

    def runtime(self) -> ForeignRuntime | None:
        """The runtime that the gate runs an export in; None for a format that is for looking at."""
        return None

    def stand_in(self) -> ForeignRuntime | None:
        """A runtime of this environment that computes what `runtime` does, for hosts without that; None if there is none."""
        return None

    def simulation(self, folder: Path) -> Simulation | None:
        """The arithmetic of the format's runtime on the files of an export; None where it can only be run."""
        return None


@dataclass(frozen=True)
class Simulation:
    """The arithmetic of a runtime: the float32 `graph` that the files of an export stand for, and `on_linear`, which returns an
    input [tokens, width] of a linear of that graph as the runtime rounds it."""

    graph: ir.Model
    on_linear: Callable[[ir.Node, Tensor], Tensor]


_FORMATS: dict[str, Format] = {}


def register(format: Format) -> None:
    """Add a format under its name."""
    known = _FORMATS.setdefault(format.name, format)
    assert type(known) is type(format), f"there is another format of the name {format.name}"


def registered() -> tuple[Format, ...]:
    """All formats in the order in which they were registered."""
    return tuple(_FORMATS.values())


def get(name: str) -> Format:
    """The format called `name`; raises CompileError if there is none."""
    if name not in _FORMATS:
        raise CompileError(STAGE, "unknown format", found=repr(name), expected=" or ".join(_FORMATS))
    return _FORMATS[name]


def check(format: Format, recipe: Recipe) -> None:
    """Raise CompileError if a format cannot carry a recipe; the error says which presets or formats would do."""
    if not (reason := format.carries.refusal(recipe)):
        return
    presets = [preset.name for preset in PRESETS.values() if not format.carries.refusal(_carried(format, preset.recipe))]
    others = [other.name for other in registered() if not other.carries.refusal(recipe)]
    ways = [f"use --quant {' or '.join(presets)}"] if presets else []
    if [name for name in recipe.methods if name not in format.carries.methods]:
        known = [name for name in METHODS if name in format.carries.methods]
        ways = [f"use --methods {','.join(known)} or fewer"]
    ways += [f"use --format {' or '.join(others)}"] if others else []
    raise CompileError(STAGE, f"format {format.name} cannot carry this", found=reason, remedy=", or ".join(ways))


def carried(format: Format, recipe: Recipe) -> tuple[Recipe, list[str]]:
    """A preset's recipe with only those methods that a format carries, and with those that take the place of others; and a note
    on each that is left out."""
    notes = [
        f"left out: {format.carries.method_refusal(name)}" for name in recipe.methods if name not in format.carries.methods
    ]
    return _carried(format, recipe), notes


def _carried(format: Format, recipe: Recipe) -> Recipe:
    substitutes = [other for name in recipe.methods for other in format.carries.substitutes.get(name, ())]
    kept = {*recipe.methods, *substitutes} & format.carries.methods
    return replace(recipe, methods=tuple(name for name in METHODS if name in kept))


def listing() -> list[dict[str, Any]]:
    """Every format with the granularities of scales that it holds, the default first, the presets and methods that it carries,
    and the reason for each that it does not."""
    return [
        {
            "name": format.name,
            "runtimes": format.runtimes,
            "granularities": list(format.granularities),
            "presets": {preset.name: format.carries.refusal(_carried(format, preset.recipe)) for preset in PRESETS.values()},
            "methods": {name: format.carries.method_refusal(name) for name in METHODS},
        }
        for format in registered()
    ]
