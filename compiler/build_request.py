"""The arguments of a build, and the checks of them that need neither the checkpoint nor the packages that builds need.

The command line imports this module before it knows that the arguments are right, and the driver only then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from belle_compile.compiler import backends, targets
from belle_compile.compiler.backends import Backend
from belle_compile.compiler.backends.base import ANY_LIBRARY, LibraryChoice
from belle_compile.compiler.devices import Target
from belle_compile.compiler.engine_directory import check_output
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.gate import DEFAULT_GATE, Gate
from belle_compile.compiler.generation import changed_defaults
from belle_compile.compiler.kv_types import AUTO
from belle_compile.compiler.places import check_checkpoint, check_file, check_reading, check_template
from belle_compile.compiler.reading import PLAIN, Reading
from belle_compile.compiler.self_written import SelfWritten
from belle_compile.passes.presets import DEFAULT_PRESET, METHODS, Recipe, find_preset, recipe_of
from belle_compile.runtime.artifact import GenerationDefaults

MOST_RANK = 512  # of an adapter


@dataclass(frozen=True)
class BuildRequest:
    """The arguments of a build: what to compile, for which target, and to which directory.

    Input: `quantization` names a preset of passes, and `methods` (keys of passes.presets.METHODS) replace the
    preset's methods. `kv_cache` is the type of the KV cache (auto: float32 with quantization none, else 16 bits). `backend` is
    the name of the backend (None: the target's default), `isas` restricts its instruction sets (empty: all), and `library` is
    the choice of what builds, for a backend with several libraries. `template` replaces the checkpoint's prompt template, by
    name or as a Jinja file. `reading` holds what else says how the checkpoint is read. `generation` changes the generation
    defaults (see `changed_defaults`). `tune` measures on this host which kernel variants suit this model's shapes, which takes
    minutes and may differ from one build to the next. Without `fuse`, ops are fused only where the backend has no kernels for
    them otherwise.

    With a `lora_rank`, the engine takes adapters of up to that rank at run time, for the linears whose names are or end with
    one of `lora_targets` (empty: all but the head).

    Calibration: `calibration` is a file of requests, a set made by calibrate-set, or says that the model writes them itself
    (None: the build is not calibrated). It guides the rounding of weights, and the
    engine must pass `gate` on the held-out requests (None: the engine is not run). With `raw_requests`, their texts are encoded
    without the prompt template. With a `size_budget` above 1, the linears that INT8 hurts most stay float32, until the INT8
    weights have grown by that factor. `weight_budget` is for INT4 weights: the linears that they hurt most get 6 or 8
    bits, while all weights of the engine take at most that many bytes (None: all linears have INT4 weights).

    Output: `force` replaces an existing engine. `dump_ir` is a directory for the graph after each pass. With `drift`, the
    report shows how far each pass moves the logits (None: for small models only, where that takes seconds). `on_progress` is
    called with (stage, done, total) during the build, with total 0 for a stage of unknown length. `on_note` is called with
    sentences on what the build decides, and `on_weight` with one line for each weight before the weights are written, see
    `ir.lazy.describe`.
    """

    checkpoint: str | Path
    output: Path
    target: str = "cpu"
    quantization: str = DEFAULT_PRESET
    methods: tuple[str, ...] | None = None
    kv_cache: str = AUTO
    backend: str | None = None
    isas: tuple[str, ...] = ()
    library: LibraryChoice = ANY_LIBRARY
    template: str | None = None
    reading: Reading = PLAIN
    generation: tuple[str, ...] = ()
    dump_ir: Path | None = None
    force: bool = False
    tune: bool = False
    fuse: bool = True
    lora_rank: int = 0
    lora_targets: tuple[str, ...] = ()
    calibration: Path | SelfWritten | None = None
    raw_requests: bool = False
    size_budget: float = 1.0
    weight_budget: int | None = None
    gate: Gate | None = DEFAULT_GATE
    drift: bool | None = None
    on_progress: Callable[[str, int, int], None] = lambda stage, done, total: None
    on_note: Callable[[str], None] = lambda note: None
    on_weight: Callable[[str], None] | None = None


@dataclass(frozen=True)
class Job:
    """A checked request, with the target, the backend and the recipe that its names stand for. `applied` is the recipe with
    only those methods that this build applies."""

    request: BuildRequest
    target: Target
    backend: Backend
    recipe: Recipe
    applied: Recipe

    def following(self, recipe: Recipe) -> Job:
        """The job with another recipe, such as one that suits the checkpoint."""
        return replace(self, recipe=recipe, applied=recipe.applied(calibrated=self.request.calibration is not None))

    @property
    def self_written(self) -> SelfWritten | None:
        """How the model writes its own requests; None where it does not."""
        return self.request.calibration if isinstance(self.request.calibration, SelfWritten) else None

    def uncalibrated(self) -> Job:
        """The job without requests."""
        return replace(self, request=replace(self.request, calibration=None)).following(self.recipe)

    def progress(self, stage: str) -> Callable[[int, int], None]:
        """The callback with which a stage reports (done, total)."""
        return lambda done, total: self.request.on_progress(stage, done, total)

    def begin(self, stage: str) -> None:
        self.progress(stage)(0, 0)


def resolve(request: BuildRequest) -> Job:
    """Look up the names in the request, and look whether its files are there; raises CompileError for everything that can be
    refused before the checkpoint is opened. It takes a fraction of a second: no package of the extra `build` is imported."""
    target, backend = targets.choose(request.target, request.backend, request.isas)
    request = _without_idle_default(request, target, backend)
    recipe = recipe_of(request.quantization, request.methods, calibrated=request.calibration is not None)
    applied = recipe.applied(calibrated=request.calibration is not None)
    backends.check(backend, target, applied)
    backends.check_kv_cache(backend, request.kv_cache)
    backend.check_library(target, request.library)
    if request.tune and (reason := backend.tuning_refusal(target)):
        raise CompileError("target", f"tuning for {target.name}", found=reason, remedy="build without --tune")
    _check_adapters(request, target, backend)
    if request.size_budget > 1 and (request.calibration is None or not recipe.quantizes):
        found, remedy = "no requests to rank layers by", "give some with --calibration"
        raise CompileError("quantization", "a size budget", found=found, expected="an INT8 preset and requests", remedy=remedy)
    _check_weight_budget(request, recipe)
    check_output(request.output, force=request.force)
    check_checkpoint(request.checkpoint)
    check_template(request.template)
    check_reading(request.reading)
    changed_defaults(GenerationDefaults(), request.generation)  # those of the checkpoint are not known yet
    if isinstance(request.calibration, Path):
        check_file("calibration", request.calibration, "requests, or a set made by belle-compile calibrate-set")
    return Job(request, target, backend, recipe, applied)


def _without_idle_default(request: BuildRequest, target: Target, backend: Backend) -> BuildRequest:
    """The request without self-written requests that nobody chose, where its preset would not use them: methods were named,
    none needs requests, or the backend does not carry those that do."""
    if not isinstance(request.calibration, SelfWritten) or not request.calibration.by_default:
        return request
    recipe = find_preset(request.quantization).recipe
    used = request.methods is None and any(METHODS[name].needs_requests for name in recipe.methods)
    ranks_layers = request.size_budget > 1 or request.weight_budget is not None
    if used and not ranks_layers and not backend.refusal(target, recipe.applied(calibrated=True)):
        return request
    return replace(request, calibration=None)


def _check_weight_budget(request: BuildRequest, recipe: Recipe) -> None:
    """Raise CompileError for a weight budget that nothing can be done with."""
    if request.weight_budget is None:
        return
    what = "a weight budget"
    if recipe.weights.group is None:
        expected, remedy = "INT4 weights", "build with --quant int4"
        raise CompileError("quantization", what, found=f"weights that are {recipe.weights}", expected=expected, remedy=remedy)
    if request.size_budget > 1:
        raise CompileError("quantization", what, found="a size budget too", remedy="leave one of them out")
    if request.calibration is None:
        remedy = "give some with --calibration, or let the model write them with --calibration self"
        raise CompileError("quantization", what, found="no requests to rank layers by", expected="requests", remedy=remedy)


def _check_adapters(request: BuildRequest, target: Target, backend: Backend) -> None:
    """Raise CompileError for adapters that the engine could not take."""
    if request.lora_targets and not request.lora_rank:
        found, remedy = "lora-targets without a rank", "give the largest rank of an adapter with --lora-rank"
        raise CompileError("adapters", "option lora-rank", found=found, expected="a rank", remedy=remedy)
    if not 0 <= request.lora_rank <= MOST_RANK:
        raise CompileError("adapters", "option lora-rank", found=str(request.lora_rank), expected=f"0 (none) to {MOST_RANK}")
    if request.lora_rank and (reason := backend.adapter_refusal(target)):
        remedy = "build without --lora-rank, or merge the adapter with --adapter"
        what = f"{backend.name} cannot build an engine for {target.name} that takes adapters"
        raise CompileError("backend", what, found=reason, remedy=remedy)
