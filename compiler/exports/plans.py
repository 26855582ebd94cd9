"""The passes of exports: those of a backend's builds, or those after which a graph still has its model's architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import onnx_ir as ir

from belle_compile.compiler.backends import Backend
from belle_compile.compiler.exports.base import Format
from belle_compile.compiler.exports.model import HEAD, ExportedModel
from belle_compile.compiler.exports.request import ExportJob
from belle_compile.compiler.stages import carried
from belle_compile.passes.base import Pass
from belle_compile.passes.calibration.data import CalibrationData
from belle_compile.passes.pipeline import FUSION, export_passes_of, passes_of, run_pipeline
from belle_compile.passes.presets import INT8, Recipe

_ROTATE, _SMOOTH = "rotate", "smooth"


@dataclass(frozen=True)
class Plan:
    """How the float32 graph of a checkpoint is transformed for a format.

    `passes` makes the passes from the requests to calibrate with (None: without any). `words` are the record's entries on
    quantization in which the export differs from its recipe, and `notes` say what is left out.
    """

    passes: Callable[[CalibrationData | None], tuple[Pass, ...]]
    words: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def plan_of(job: ExportJob, model: ExportedModel) -> Plan:
    """Decide which passes a job needs, and whether the residual stream of a model with its own architecture is rotated, which
    gives a tied head a weight of its own."""
    format, recipe = job.format, job.recipe
    if format.backend is not None:
        return Plan(partial(_of_backend, format.backend, recipe))
    rotates = _ROTATE in recipe.methods
    reason = _unrotated(job, model) if rotates else ""
    words = {"activations": format.activations} if format.activations else {}
    if rotates:
        words["rotations"] = f"{'values' if reason else 'residual stream and values'}, folded into the weights"
    passes = partial(
        export_passes_of,
        recipe,
        keep=() if format.quantizes_tables else (HEAD,),
        norm="" if reason else model.release.norm,
        integers=format.integers and recipe.weights == INT8,
        tables=format.quantizes_tables,
    )
    note = f"the residual stream is not rotated, because {reason}"
    return Plan(passes, words, (note,) if reason else ())


def transform_engine(graph: ir.Model, format: Format, recipe: Recipe) -> None:
    """Run the passes on the quantized graph of an engine with that recipe, which is not fused."""
    if format.backend is not None:
        run_pipeline(graph, carried(FUSION, format.backend, recipe)[1])


def _of_backend(backend: Backend, recipe: Recipe, data: CalibrationData | None) -> tuple[Pass, ...]:
    before, fusions = carried(passes_of(recipe, data), backend, recipe)
    return (*before, *fusions)


def _unrotated(job: ExportJob, model: ExportedModel) -> str:
    """The reason why the residual stream stays as it is; empty if it is rotated."""
    format, asked = job.format, job.request.keep_tied
    if model.tied_head:
        default = {None: format.keeps_tied, True: "--keep-tied asks for it", False: ""}[asked]
        reason = model.release.tied_only.get(format.name, "") or default
        return f"the head stays tied to the embedding: {reason}" if reason else ""
    return format.smooths_instead if _SMOOTH in job.recipe.methods and asked is not False else ""
