"""Which passes run, in which order, and running them with the graph verified after each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.ir.text import save_onnx, to_text
from belle_compile.compiler.ir.verify import verify
from belle_compile.passes.base import Pass, PassResult
from belle_compile.passes.calibration.data import CalibrationData
from belle_compile.passes.cleanup.merge_duplicates import MergeDuplicates
from belle_compile.passes.cleanup.remove_identities import RemoveIdentities
from belle_compile.passes.cleanup.remove_unused import RemoveUnused
from belle_compile.passes.fusion.fuse_activation_quantize import FuseActivationQuantize
from belle_compile.passes.fusion.fuse_add_norm import FuseAddNorm
from belle_compile.passes.fusion.fuse_dequantize import FuseDequantize
from belle_compile.passes.fusion.fuse_norm_quantize import FuseNormQuantize
from belle_compile.passes.fusion.fuse_projections import FuseProjections
from belle_compile.passes.partition.partition_tensors import PartitionTensors
from belle_compile.passes.quantization.gptq_rounding import GptqRounding
from belle_compile.passes.quantization.quantize_embedding import QuantizeEmbedding
from belle_compile.passes.quantization.quantize_groups import QuantizeGroups
from belle_compile.passes.quantization.quantize_linears import QuantizeLinears
from belle_compile.passes.quantization.scheme import INT4, INT8, WeightScheme
from belle_compile.passes.quantization.smooth_activations import SmoothActivations
from belle_compile.passes.quantization.static_activations import StaticActivations
from belle_compile.passes.rotation.fold_embedding_norm import FoldEmbeddingNorm
from belle_compile.passes.rotation.fold_layer_norms import FoldLayerNorms
from belle_compile.passes.rotation.rotate_activations import RotateActivations
from belle_compile.passes.rotation.rotate_residual import RotateResidual
from belle_compile.passes.rotation.rotate_values import RotateValues

# What follows matches a tidy graph
CLEANUP: tuple[Pass, ...] = (RemoveIdentities(), MergeDuplicates(), RemoveUnused())
# Spread outliers over all channels before there is anything to round; LayerNorm models are made RMSNorm models for it
ROTATION: tuple[Pass, ...] = (FoldEmbeddingNorm(), FoldLayerNorms(), RotateResidual(), RotateValues())
# Linears first, then what lies between them
FUSION: tuple[Pass, ...] = (FuseDequantize(), FuseProjections(), FuseAddNorm(), FuseNormQuantize(), FuseActivationQuantize())
# What makes INT8 more accurate; those of CALIBRATED look at requests
METHODS = ("smooth", "rotate", "rotate-online", "gptq", "static")
CALIBRATED = ("smooth", "gptq", "static")


@dataclass(frozen=True)
class Recipe:
    """A preset: the bits of activations (0: everything stays float32), the methods used, and the scheme of weights."""

    bits: int = 8
    methods: tuple[str, ...] = ()
    weights: WeightScheme = INT8


RECIPES: Mapping[str, Recipe] = {
    "int8": Recipe(8, ("rotate", "rotate-online", "gptq")),
    "int8-accurate": Recipe(16, ("rotate", "gptq")),
    "int8-plain": Recipe(8),
    "int4": Recipe(8, ("rotate", "rotate-online", "gptq"), weights=INT4),
    "none": Recipe(0),
}


def passes_of(
    recipe: Recipe, data: CalibrationData | None = None, keep: tuple[str, ...] = (), ranks: int = 1
) -> tuple[Pass, ...]:
    """The passes of a recipe, in order. Without requests those methods are left out that need some. `keep` are names of linears
    that stay float32; `ranks` is how many the result will be divided among."""
    if not recipe.bits:
        return (*CLEANUP, FuseProjections(), FuseAddNorm())
    smooth = (SmoothActivations(data),) if "smooth" in recipe.methods and data else ()
    rotate = ROTATION if "rotate" in recipe.methods else ()
    # What no weight can absorb costs a little time in every step, and is worth it where activations get 8 bits
    online = (RotateActivations(ranks=ranks, group=recipe.weights.group or 1),) if "rotate-online" in recipe.methods else ()
    gptq = GptqRounding(data, keep=keep, weights=recipe.weights) if "gptq" in recipe.methods and data else None
    # First what takes some linears only. The embedding after the linears: a tied head reads the same INT8 table
    groups = (QuantizeGroups(keep=keep, weights=recipe.weights),) if recipe.weights.group else ()
    quantize = (*groups, QuantizeLinears(keep=keep, activation_bits=recipe.bits), QuantizeEmbedding())
    static = (StaticActivations(data, activation_bits=recipe.bits),) if "static" in recipe.methods and data else ()
    return (*CLEANUP, *smooth, *rotate, *online, *((gptq,) if gptq else ()), *static, *quantize, *FUSION)


PRESETS: Mapping[str, tuple[Pass, ...]] = {name: passes_of(recipe) for name, recipe in RECIPES.items()}


def at_fusion(passes: Sequence[Pass]) -> tuple[tuple[Pass, ...], tuple[Pass, ...]]:
    """The passes that see the whole model, and the fusions behind them, which see the graph of a rank where there are several:
    weights get their scales once, and a rank's linears are fused by what it has of them."""
    first = next(
        (i for i, step in enumerate(passes) if type(step).__module__.startswith("belle_compile.passes.fusion")), len(passes)
    )
    return tuple(passes[:first]), tuple(passes[first:])


# Hears of the graph as it is after a pass, and before the first one with nothing else; it may read the graph and not keep it.
OnPass = Callable[[Pass | None, ir.Model, PassResult | None], None]


def unheard(step: Pass | None, model: ir.Model, result: PassResult | None) -> None:
    """An observer that does nothing."""


def run_pipeline(
    model: ir.Model, passes: Sequence[Pass], dump_dir: Path | None = None, on_pass: OnPass = unheard
) -> list[dict[str, Any]]:
    """Run the passes on the model in place; returns the manifest's record of each: name, options, changes, refusals.

    The graph is verified before the first pass and after each. With `dump_dir`, every stage is written there as text and as
    an ONNX graph without weights: 00-frontend, 01-<pass>, ... Raises CompileError that names the pass which failed
    and those that ran before it.
    """
    verify(model)
    _dump(model, dump_dir, 0, "frontend")
    on_pass(None, model, None)
    records: list[dict[str, Any]] = []
    for number, step in enumerate(passes, 1):
        try:
            result = step.run(model)
            _dump(model, dump_dir, number, step.name)
            verify(model)
        except Exception as error:
            if isinstance(step, PartitionTensors) and isinstance(error, CompileError):
                raise  # a number of ranks that the model cannot have is no failure of the pass
            before = ", ".join(record["name"] for record in records) or "none"
            inner = error if isinstance(error, CompileError) else None
            raise CompileError(
                "passes",
                f"{step.name} failed",
                node=inner.node if inner else "",
                found=str(error).removesuffix(".") if inner else f"{type(error).__name__}: {error}",
                remedy=f"passes that ran before it: {before}",
            ) from error
        records.append(
            {"name": step.name, "options": step.options, "changes": result.changes, "refusals": list(result.refusals)}
        )
        on_pass(step, model, result)
    return records


def run_ranks(
    model: ir.Model, fusions: Sequence[Pass], ranks: int, dump_dir: Path | None = None, on_pass: OnPass = unheard
) -> tuple[list[ir.Model], list[dict[str, Any]]]:
    """The graphs of all ranks, made of parts of the whole one and fused, and the records of rank 0, which are those of all.
    `dump_dir` gets a folder for each rank; `on_pass` hears of rank 0."""
    graphs = [model.clone() for _ in range(ranks)]
    records: list[dict[str, Any]] = []
    for rank, graph in enumerate(graphs):
        folder = None if dump_dir is None else dump_dir / f"rank{rank}"
        passes = (PartitionTensors(rank, ranks), *fusions)
        found = run_pipeline(graph, passes, folder, unheard if rank else partial(_not_first, on_pass))
        records = records or found
    return graphs, records


def run_for(
    model: ir.Model, passes: Sequence[Pass], ranks: int, dump_dir: Path | None = None, on_pass: OnPass = unheard
) -> tuple[list[ir.Model], list[dict[str, Any]]]:
    """Run the passes for so many ranks: the graph of each (the model itself where it is alone), and what each pass did.
    From the partition on, `on_pass` hears of rank 0."""
    if ranks == 1:
        return [model], run_pipeline(model, passes, dump_dir, on_pass)
    before, fusions = at_fusion(passes)
    records = run_pipeline(model, before, dump_dir, on_pass)
    graphs, of_ranks = run_ranks(model, fusions, ranks, dump_dir, on_pass)
    return graphs, records + of_ranks


def _not_first(on_pass: OnPass, step: Pass | None, model: ir.Model, result: PassResult | None) -> None:
    """Leaves out the graph that the ranks begin with, which has been heard of."""
    if step is not None:
        on_pass(step, model, result)


def _dump(model: ir.Model, dump_dir: Path | None, number: int, name: str) -> None:
    if dump_dir is None:
        return
    dump_dir.mkdir(parents=True, exist_ok=True)
    stem = f"{number:02d}-{name}"
    (dump_dir / f"{stem}.txt").write_text(to_text(model), encoding="utf-8")
    save_onnx(model, dump_dir / f"{stem}.onnx")
