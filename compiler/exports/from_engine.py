"""Engines as sources of exports: their integers are exported as they are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from belle_compile.compiler.checkpoint.templates import PromptTemplate
from belle_compile.compiler.engine_graph import graph_of, reader_of
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.exports.base import Format
from belle_compile.compiler.exports.directory import STAGE
from belle_compile.compiler.exports.model import ExportedModel, Integers, Module, modules_of, release_of
from belle_compile.compiler.exports.request import AUTO_DTYPE, ExportJob
from belle_compile.compiler.families import registry
from belle_compile.compiler.ir.lazy import lazy
from belle_compile.passes.presets import METHODS, PRESETS, Recipe, activation_words
from belle_compile.runtime.artifact import Manifest, read_manifest, verify_files

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
    reader = reader_of(engine, manifest, STAGE)
    family = registry.by_name(manifest.model.family, engine)
    verify_files(engine, manifest, full=True, progress=lambda file, done, total: job.progress("digest")(done, total))
    graph = graph_of(engine, manifest, reader)
    modules, tied = modules_of(graph.graph, release_of(family))
    if (reason := release_of(family).tied_only.get(job.format.name, "")) and not tied:
        raise _refusal(engine, job.format, f"a head that is not the embedding, and {reason}")
    config = release_of(family).config_of_graph(graph.graph, manifest.model.dimensions) | {"tie_word_embeddings": tied}
    special, template = manifest.special_tokens, manifest.prompt_template
    dtype = job.format.default_dtype or "float16"
    model = ExportedModel(
        name=manifest.model.name,
        family=family,
        config=config,
        dimensions=family.read_config(config),
        modules=tuple(module if job.format.quantizes_tables else _with_float_table(module) for module in modules),
        tied_head=tied,
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


def _with_float_table(module: Module) -> Module:
    """A module whose embedding table or head has floats in place of integers: their product with the scales."""
    if not isinstance(module.weight, Integers) or not (module.is_table or module.is_head):
        return module
    return replace(module, weight=_product(module.name, module.weight))


def _product(name: str, weight: Integers) -> ir.TensorProtocol:
    def compute() -> Any:
        return weight.integers.numpy() * weight.scales.numpy()[:, None].astype(np.float32)

    sources = [weight.integers, weight.scales]
    return lazy(f"{name}.float", compute, weight.shape, ir.DataType.FLOAT, step="dequantized", sources=sources)
