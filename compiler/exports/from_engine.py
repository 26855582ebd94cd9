"""Engines as sources of exports: their integers are exported as they are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from belle_compile.compiler.checkpoint.templates import PromptTemplate
from belle_compile.compiler.engine_graph import graph_of, graph_without_values, reader_of
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.exports.base import Format
from belle_compile.compiler.exports.directory import STAGE
from belle_compile.compiler.exports.model import ExportedModel
from belle_compile.compiler.exports.plans import transform_engine
from belle_compile.compiler.exports.request import AUTO_DTYPE, ExportJob
from belle_compile.compiler.families import registry
from belle_compile.passes.presets import METHODS, PRESETS, Recipe, activation_words
from belle_compile.runtime.artifact import Manifest, read_manifest, verify_files
from belle_compile.runtime.program import WEIGHTS_NAME

UNMEASURED = "not measured: made from an engine, without the model's own logits"


@dataclass(frozen=True)
class EngineSource:
    """An engine's manifest, and the model that its graph and files make."""

    manifest: Manifest
    model: ExportedModel


def open_engine(engine: Path, job: ExportJob) -> EngineSource:
    """Open an engine for an export.

    Raises CompileError for an engine whose weights or methods the format cannot carry, or whose graph is not of the model's own
    architecture, and EngineError for a damaged one.
    """
    manifest = read_manifest(engine)
    _check(engine, manifest, job.format)
    backend = job.format.backend
    copied = backend is not None and backend.name == manifest.target.backend
    reader = None if copied else reader_of(engine, manifest, STAGE)
    family = registry.by_name(manifest.model.family, engine)
    verify_files(engine, manifest, full=True, progress=lambda file, done, total: job.progress("digest")(done, total))
    graph = graph_without_values(engine, manifest, STAGE) if reader is None else graph_of(engine, manifest, reader)
    transform_engine(graph, job.format, recipe_of_engine(manifest))
    special, template = manifest.special_tokens, manifest.prompt_template
    dtype = job.format.default_dtype or "float16"
    model = ExportedModel(
        name=manifest.model.name,
        family=family,
        graph=graph,
        stated=None,
        float_dtype=dtype if job.request.dtype == AUTO_DTYPE else job.request.dtype,
        tokenizer_json=(engine / "tokenizer.json").read_text(encoding="utf-8"),
        special={
            "bos_token_id": special.bos,
            "eos_token_ids": list(special.eos),
            "pad_token_id": special.pad,
            "bos_token": template.bos_token,
            "eos_token": template.eos_token,
            "add_bos_raw": special.add_bos,
        },
        template=PromptTemplate(template.name, template.jinja),
        generation=manifest.generation,
        float_tables=not job.format.quantizes_tables,
        copied=engine / "rank0" / WEIGHTS_NAME if copied else None,
    )
    job.format.check_model(model)
    return EngineSource(manifest, model)


def _check(engine: Path, manifest: Manifest, format: Format) -> None:
    """Raise CompileError where the format cannot carry what the engine was built with."""
    recipe = recipe_of_engine(manifest)
    reason = format.carries.refusal(recipe)
    if recipe.quantizes and not format.integers:
        reason = "integers, and the format holds floats"
    if reason:
        raise _refusal(engine, format, reason)


def _refusal(engine: Path, format: Format, found: str) -> CompileError:
    carried = ",".join(name for name in METHODS if name in format.carries.methods)
    return CompileError(
        STAGE, f"format {format.name} cannot carry the engine {engine}", found=found,
        remedy=f"export its checkpoint, or an engine built with --methods {carried} or fewer",
    )  # fmt: skip


def recipe_of_engine(manifest: Manifest) -> Recipe:
    """The recipe that an engine was built with, from the words of its manifest."""
    words = manifest.quantization
    methods = tuple(method.name for method in METHODS.values() if method.manifest[0] in words)
    for preset in PRESETS.values():
        recipe = preset.recipe
        if str(recipe.weights) == words["weights"] and activation_words(recipe, methods) == words["activations"]:
            return replace(recipe, methods=methods)
    return Recipe(PRESETS["none"].recipe.weights, 32, methods)
