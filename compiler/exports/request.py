"""The arguments of an export, and the checks of them that need neither the checkpoint nor the packages that exports need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

from belle_compile.compiler.engine_directory import is_engine
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.exports import base
from belle_compile.compiler.exports.base import Format
from belle_compile.compiler.exports.directory import STAGE, output_directory
from belle_compile.compiler.gate import DEFAULT_GATE, Gate
from belle_compile.compiler.generation import changed_defaults
from belle_compile.compiler.places import check_checkpoint, check_file, check_reading, check_template
from belle_compile.compiler.reading import PLAIN, Reading
from belle_compile.compiler.self_written import SelfWritten
from belle_compile.passes.presets import DEFAULT_PRESET, Recipe, recipe_of
from belle_compile.runtime.artifact import GenerationDefaults

AUTO_DTYPE = "auto"
DTYPES = (AUTO_DTYPE, "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class ExportRequest:
    """The arguments of an export: `source` is a checkpoint, or an engine whose integers are exported as they are.

    `quantization`, `methods`, `template`, `reading`, `generation`, `calibration`, `raw_requests`, `gate`, `force` and
    `on_progress` are those of `BuildRequest`; an engine takes none of them but the last two. Methods of a preset that the
    format cannot carry are left out with a note; methods that are asked for by name are refused instead. With `keep_tied`, a
    head that is tied to the embedding stays so, and the residual stream is not rotated; if it is False, the stream is rotated
    wherever the method `rotate` is used (None: as the format does by default).
    `granularity` says which weights share a scale: those of an output channel, or of a block of inputs (None: the format's
    first; an engine's are those of channels). `dtype` is the type of tensors that keep floats. `runtime_python` is the Python
    interpreter in whose environment the gate looks for the format's runtime (None: this one).
    """

    source: str | Path
    output: Path
    format: str
    quantization: str = DEFAULT_PRESET
    methods: tuple[str, ...] | None = None
    keep_tied: bool | None = None
    granularity: str | None = None
    dtype: str = AUTO_DTYPE
    template: str | None = None
    reading: Reading = PLAIN
    generation: tuple[str, ...] = ()
    calibration: Path | SelfWritten | None = None
    raw_requests: bool = False
    gate: Gate | None = DEFAULT_GATE
    force: bool = False
    runtime_python: Path | None = None
    on_progress: Callable[[str, int, int], None] = lambda stage, done, total: None


@dataclass(frozen=True)
class ExportJob:
    """A checked request, with the format and the recipe that its names stand for, and notes on methods that are left out."""

    request: ExportRequest
    format: Format
    recipe: Recipe
    notes: tuple[str, ...]
    from_engine: bool = False

    def progress(self, stage: str) -> Callable[[int, int], None]:
        """The callback with which a stage reports (done, total)."""
        return lambda done, total: self.request.on_progress(stage, done, total)

    def begin(self, stage: str) -> None:
        self.progress(stage)(0, 0)


def resolve(request: ExportRequest) -> ExportJob:
    """Look up the names in the request, and look whether its files are there; raises CompileError for everything that can be
    refused before the checkpoint is opened. It imports no package of the extra `build`."""
    format = base.get(request.format)
    output_directory(request.output, force=request.force).check_output()
    check_file(STAGE, request.runtime_python, "a Python interpreter")
    _check_format_options(request, format)
    if is_engine(Path(request.source)):
        _check_engine_options(request)
        return ExportJob(request, format, Recipe(), (), from_engine=True)
    calibrated = request.calibration is not None
    recipe = recipe_of(request.quantization, request.methods, calibrated=calibrated)
    notes: list[str] = []
    if request.methods is None:
        recipe, notes = base.carried(format, recipe)
    base.check(format, recipe)
    granularity = _granularity(request, format)
    if granularity and recipe.quantizes:
        recipe = replace(recipe, weights=base.GRANULARITIES[granularity])
    check_checkpoint(request.source)
    check_template(request.template)
    check_reading(request.reading)
    changed_defaults(GenerationDefaults(), request.generation)  # those of the checkpoint are not known yet
    if not isinstance(request.calibration, SelfWritten):
        check_file("calibration", request.calibration, "requests, or a set made by belle-compile calibrate-set")
    return ExportJob(request, format, recipe.applied(calibrated), tuple(notes))


def _granularity(request: ExportRequest, format: Format) -> str:
    """Which weights share a scale; empty for a format of floats. Raises CompileError for what the format does not hold."""
    asked = request.granularity
    if asked is None:
        return next(iter(format.granularities), "")
    if asked not in base.GRANULARITIES:
        expected = " or ".join(base.GRANULARITIES)
        raise CompileError(STAGE, "unknown granularity", found=repr(asked), expected=expected)
    if asked not in format.granularities:
        names = " or ".join(other.name for other in base.registered() if asked in other.granularities)
        found = f"scales per {' or '.join(format.granularities)}" if format.granularities else "floats"
        raise CompileError(STAGE, f"scales per {asked} in the format {format.name}", found=found, expected=f"--format {names}")
    return asked


def _check_format_options(request: ExportRequest, format: Format) -> None:
    """Raise CompileError for an option that the format has no use for."""
    for name, option in base.OPTIONS.items():
        if name in _given(request) and name not in format.options:
            others = " or ".join(other.name for other in base.registered() if name in other.options)
            raise CompileError(
                STAGE, f"option {option}", found=f"the format {format.name}, which has none", expected=f"--format {others}",
                remedy="leave it out",
            )  # fmt: skip


def _given(request: ExportRequest) -> list[str]:
    """The fields that have another value than by default."""
    default = ExportRequest(request.source, request.output, request.format)
    return [field.name for field in fields(request) if getattr(request, field.name) != getattr(default, field.name)]


def _check_engine_options(request: ExportRequest) -> None:
    """Raise CompileError for options that change a model: an engine's is exported as it is."""
    changing = {
        "quantization": "--quant",
        "methods": "--methods",
        "granularity": "--granularity",
        "calibration": "--calibration",
        "template": "--template",
        "generation": "--generation-defaults",
    }
    given = [option for name, option in changing.items() if name in _given(request)]
    given += request.reading.options
    if given:
        raise CompileError(
            STAGE, f"option {', '.join(given)}", found=f"the engine {request.source}, whose integers are exported as they are",
            expected="a checkpoint", remedy="leave it out, or export the checkpoint that the engine was built from",
        )  # fmt: skip
