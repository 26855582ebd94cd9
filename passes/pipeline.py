"""The order of all passes, those that a recipe uses, and functions that run them and verify the graph after each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.ir.text import save_onnx, to_text
from belle_compile.compiler.ir.verify import verify
from belle_compile.passes.adapters.add_low_rank import AddLowRank
from belle_compile.passes.base import Pass, PassResult, Phase
from belle_compile.passes.calibration.data import CalibrationData
from belle_compile.passes.cleanup.merge_duplicates import MergeDuplicates
from belle_compile.passes.cleanup.remove_identities import RemoveIdentities
from belle_compile.passes.cleanup.remove_unused import RemoveUnused
from belle_compile.passes.fusion.fuse_activation_quantize import FuseActivationQuantize
from belle_compile.passes.fusion.fuse_add_norm import FuseAddNorm
from belle_compile.passes.fusion.fuse_dequantize import FuseDequantize
from belle_compile.passes.fusion.fuse_low_rank import FuseLowRank
from belle_compile.passes.fusion.fuse_norm_quantize import FuseNormQuantize
from belle_compile.passes.fusion.fuse_projections import FuseProjections
from belle_compile.passes.partition.partition_tensors import PartitionTensors
from belle_compile.passes.presets import Recipe
from belle_compile.passes.quantization.gptq_rounding import GptqRounding
from belle_compile.passes.quantization.keep_integers import KeepIntegers
from belle_compile.passes.quantization.quantize_embedding import QuantizeEmbedding
from belle_compile.passes.quantization.quantize_groups import QuantizeGroups
from belle_compile.passes.quantization.quantize_linears import QuantizeLinears
from belle_compile.passes.quantization.scheme import INT8, ONE_SIZE, MoreBits, WeightScheme
from belle_compile.passes.quantization.smooth_activations import SmoothActivations
from belle_compile.passes.quantization.static_activations import StaticActivations
from belle_compile.passes.quantization.use_more_bits import UseMoreBits
from belle_compile.passes.rotation.fold_embedding_norm import FoldEmbeddingNorm
from belle_compile.passes.rotation.fold_layer_norms import FoldLayerNorms
from belle_compile.passes.rotation.reorder_channels import ReorderChannels
from belle_compile.passes.rotation.rotate_activations import RotateActivations
from belle_compile.passes.rotation.rotate_centered_residual import RotateCenteredResidual
from belle_compile.passes.rotation.rotate_residual import RotateResidual
from belle_compile.passes.rotation.rotate_values import RotateValues

# What uses a pass of no method: every recipe, recipes with integer weights, with scales for groups of inputs, with more
# bits for some linears, and with integers that the checkpoint holds; exports with a rotation of a residual stream that
# norms of these ops read, and with integers in embedding and head; and engines that take adapters
ALWAYS, INTEGERS, GROUPS, MIXED, TABLES, KEPT = "always", "integers", "groups", "mixed bits", "tables", "kept integers"
ADAPTERS = "adapters"
RMS_NORM, LAYER_NORM = "RMSNormalization", "LayerNormalization"


@dataclass(frozen=True)
class Options:
    """Arguments for the constructors of passes. `PIPELINE` names those that each pass takes; others keep their defaults.

    `data` are the calibration requests, `keep` glob patterns of linears that stay float32, `more_bits` the linears that get
    more than others, and `ranks` is the number of ranks that the model will be divided among.
    `weights`, `activation_bits` and `group` (channels that stay together in a rank) come from the recipe. `lora_rank` is the
    largest rank of adapters (0: none), `lora_targets` the linears that they may change.
    """

    data: CalibrationData | None
    keep: tuple[str, ...]
    ranks: int
    weights: WeightScheme
    activation_bits: int
    lora_rank: int = 0
    lora_targets: tuple[str, ...] = ()
    more_bits: MoreBits = ONE_SIZE

    @property
    def group(self) -> int:
        return self.weights.group or 1

    @property
    def keeps_tied(self) -> bool:
        """Whether embedding and head keep one table: beside weights of 4 bits, a second one would be much of a small model."""
        return self.weights.bits < INT8.bits


@dataclass(frozen=True)
class Step:
    """A place in the pipeline: the class of a pass, what uses it (a method of `passes.presets`, or `ALWAYS`, `INTEGERS`,
    `GROUPS` or `KEPT`), and the fields of `Options` that its constructor takes."""

    pass_class: type[Pass]
    used_by: str = ALWAYS
    takes: tuple[str, ...] = ()

    def with_options(self, options: Options) -> Pass:
        """Construct the pass."""
        return self.pass_class(**{name: getattr(options, name) for name in self.takes})


PIPELINE: tuple[Step, ...] = (
    # Clean up: the passes that follow match a tidy graph.
    Step(RemoveIdentities),
    Step(MergeDuplicates),
    Step(RemoveUnused),
    # Reorder, then smooth: outliers of activations move together, and into weights, channel by channel.
    Step(ReorderChannels, "reorder", ("data",)),
    Step(SmoothActivations, "smooth", ("data", "weights")),
    # Rotate: spread outliers over all channels before anything is rounded. LayerNorm models become RMSNorm models first.
    Step(FoldEmbeddingNorm, "rotate"),
    Step(FoldLayerNorms, "rotate"),
    Step(RotateResidual, "rotate", ("keeps_tied",)),
    Step(RotateValues, "rotate"),
    # A rotation that no weight can absorb costs a little time in every step; 8-bit activations are worth it.
    Step(RotateActivations, "rotate-online", ("ranks", "group")),
    # Choose the bits of each linear.
    Step(UseMoreBits, MIXED, ("more_bits",)),
    # Integers of the checkpoint come first: other passes choose those of the weights that are left.
    Step(KeepIntegers, KEPT, ("keep", "weights", "activation_bits")),
    # Calibrate: choose integers of weights and scales of activations by requests, while everything is float32.
    Step(GptqRounding, "gptq", ("data", "keep", "weights")),
    Step(StaticActivations, "static", ("data", "activation_bits")),
    # Quantize: first the linears that get scales for groups, then the others; the embedding comes last, so that a tied head
    # reads the same INT8 table.
    Step(QuantizeGroups, GROUPS, ("keep", "weights")),
    Step(QuantizeLinears, INTEGERS, ("keep", "activation_bits")),
    Step(QuantizeEmbedding, INTEGERS),
    # Partition: where there are several ranks, `run_for` makes the graph of each here.
    # Adapters: beside linears that are not fused yet, so that each has the name that adapters know it by.
    Step(AddLowRank, ADAPTERS, ("lora_rank", "lora_targets")),
    # Fuse: linears first, then the ops between them.
    Step(FuseDequantize, INTEGERS),
    Step(FuseProjections),
    Step(FuseLowRank, ADAPTERS),
    Step(FuseAddNorm),
    Step(FuseNormQuantize, INTEGERS),
    Step(FuseActivationQuantize, INTEGERS),
)

# The passes of exports, after which a graph still has the architecture of its checkpoint: norms stay as they are, nothing is
# computed at run time that the architecture does not compute, and nothing is fused.
EXPORT_PIPELINE: tuple[Step, ...] = (
    Step(RemoveIdentities),
    Step(MergeDuplicates),
    Step(RemoveUnused),
    Step(ReorderChannels, "reorder", ("data",)),
    Step(SmoothActivations, "smooth", ("data", "weights")),
    # Rotate: RMSNorms by any rotation, LayerNorms by one that leaves the all-ones vector in place.
    Step(RotateResidual, RMS_NORM),
    Step(RotateCenteredResidual, LAYER_NORM),
    Step(RotateValues, "rotate"),
    # Quantize, as in engines. Runtimes that keep embedding and head in floats need no integers there.
    Step(KeepIntegers, KEPT, ("keep", "weights", "activation_bits")),
    Step(GptqRounding, "gptq", ("data", "keep", "weights")),
    Step(QuantizeLinears, INTEGERS, ("keep", "activation_bits")),
    Step(QuantizeEmbedding, TABLES),
)

# The fusing passes of every graph, which may or may not find something; those for adapters come only with these.
FUSION: tuple[Pass, ...] = tuple(
    step.pass_class() for step in PIPELINE if step.pass_class.phase is Phase.FUSION and step.used_by != ADAPTERS
)


def passes_of(
    recipe: Recipe,
    data: CalibrationData | None = None,
    keep: tuple[str, ...] = (),
    ranks: int = 1,
    *,
    more_bits: MoreBits = ONE_SIZE,
    lora_rank: int = 0,
    lora_targets: tuple[str, ...] = (),
) -> tuple[Pass, ...]:
    """The passes of a recipe, in order. Without requests (`data` None), those of methods that need requests are left out.
    The other arguments are those of `Options`."""
    options = Options(data, keep, ranks, recipe.weights, recipe.activation_bits, lora_rank, lora_targets, more_bits)
    uses = {ALWAYS, *recipe.methods_used(calibrated=data is not None)}
    uses |= {INTEGERS} if recipe.quantizes else set()
    uses |= {GROUPS} if recipe.weights.group is not None else set()
    uses |= {MIXED} if more_bits else set()
    uses |= {KEPT} if recipe.keeps_integers else set()
    uses |= {ADAPTERS} if lora_rank else set()
    return tuple(step.with_options(options) for step in PIPELINE if step.used_by in uses)


def export_passes_of(
    recipe: Recipe,
    data: CalibrationData | None = None,
    keep: tuple[str, ...] = (),
    *,
    norm: str = "",
    integers: bool = True,
    tables: bool = False,
) -> tuple[Pass, ...]:
    """The passes of an export with a recipe, in order; `data` and `keep` are those of `passes_of`.

    `norm` is the op of the norms that read a residual stream which the method `rotate` may rotate; if it is empty, that method
    rotates the attention's values only. Without `integers`, nothing is rounded. With
    `tables`, embedding and head get integers too.
    """
    options = Options(data, keep, 1, recipe.weights, recipe.activation_bits)
    uses = {ALWAYS, *recipe.methods_used(calibrated=data is not None)}
    uses |= {norm} if "rotate" in uses else set()
    uses |= {INTEGERS} if integers else set()
    uses |= {TABLES} if integers and tables else set()
    uses |= {KEPT} if recipe.keeps_integers else set()
    return tuple(step.with_options(options) for step in EXPORT_PIPELINE if step.used_by in uses)


def at_fusion(passes: Sequence[Pass]) -> tuple[tuple[Pass, ...], tuple[Pass, ...]]:
    """Split passes into those that run on the whole model and those after them, which run on the graph of each rank: fusions,
    and before these what makes room for adapters.

    So weights are quantized once for all ranks, and each rank fuses the parts of linears that it has.
    """
    first = next((i for i, step in enumerate(passes) if step.phase > Phase.PARTITION), len(passes))
    return tuple(passes[:first]), tuple(passes[first:])


# Callback invoked after each pass with (pass, model, result), and once before the first pass with (None, model, None). It may
# read the model but must not keep a reference to it.
OnPass = Callable[[Pass | None, ir.Model, PassResult | None], None]


def ignore_pass(step: Pass | None, model: ir.Model, result: PassResult | None) -> None:
    """Do nothing: the default for `on_pass`."""


def run_pipeline(
    model: ir.Model, passes: Sequence[Pass], dump_dir: Path | None = None, on_pass: OnPass = ignore_pass
) -> list[dict[str, Any]]:
    """Run the passes on the model in place; return the manifest's record of each: name, options, changes, refusals.

    The graph is verified before the first pass and after each. With `dump_dir`, every stage is written there as text and as
    an ONNX graph without weights: 00-frontend, 01-<pass>, ... Raises a CompileError that names the pass which failed
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
            if isinstance(step, (PartitionTensors, AddLowRank)) and isinstance(error, CompileError):
                raise  # the model cannot have this number of ranks or these targets: an error of the request, not of the pass
            raise _failure(step, error, records) from error
        records.append(
            {"name": step.name, "options": step.options, "changes": result.changes, "refusals": list(result.refusals)}
        )
        on_pass(step, model, result)
    return records


def _failure(step: Pass, error: Exception, records: Sequence[dict[str, Any]]) -> CompileError:
    """The error of a pass that failed after the passes of the records."""
    inner = error if isinstance(error, CompileError) else None
    return CompileError(
        "passes",
        f"{step.name} failed",
        node=inner.node if inner else "",
        found=str(error).removesuffix(".") if inner else f"{type(error).__name__}: {error}",
        remedy=f"passes that ran before it: {', '.join(record['name'] for record in records) or 'none'}",
    )


def run_ranks(
    model: ir.Model, fusions: Sequence[Pass], ranks: int, dump_dir: Path | None = None, on_pass: OnPass = ignore_pass
) -> tuple[list[ir.Model], list[dict[str, Any]]]:
    """Partition the model and run the fusions on the graph of each rank; the model itself stays as it is.

    Returns the graphs, and the records of rank 0, which are those of all ranks. `dump_dir` gets a folder for each rank;
    `on_pass` is invoked for rank 0 only, and not before the first pass.
    """
    graphs = [model.clone() for _ in range(ranks)]
    records: list[dict[str, Any]] = []
    for rank, graph in enumerate(graphs):
        folder = None if dump_dir is None else dump_dir / f"rank{rank}"
        passes = (PartitionTensors(rank, ranks), *fusions)
        rank_records = run_pipeline(graph, passes, folder, ignore_pass if rank else partial(_after_passes, on_pass))
        records = records or rank_records
    return graphs, records


def run_for(
    model: ir.Model, passes: Sequence[Pass], ranks: int, dump_dir: Path | None = None, on_pass: OnPass = ignore_pass
) -> tuple[list[ir.Model], list[dict[str, Any]]]:
    """Run the passes for a number of ranks; return the graph of each rank and the record of each pass.

    The graph of a single rank is the model itself, changed in place. From the partition on, `on_pass` is invoked for rank 0.
    """
    if ranks == 1:
        return [model], run_pipeline(model, passes, dump_dir, on_pass)
    before, fusions = at_fusion(passes)
    records = run_pipeline(model, before, dump_dir, on_pass)
    graphs, rank_records = run_ranks(model, fusions, ranks, dump_dir, on_pass)
    return graphs, records + rank_records


def _after_passes(on_pass: OnPass, step: Pass | None, model: ir.Model, result: PassResult | None) -> None:
    """Invoke the callback after each pass, and not for the graph before the first one, which it has seen already."""
    if step is not None:
        on_pass(step, model, result)


def _dump(model: ir.Model, dump_dir: Path | None, number: int, name: str) -> None:
    if dump_dir is None:
        return
    dump_dir.mkdir(parents=True, exist_ok=True)
    stem = f"{number:02d}-{name}"
    (dump_dir / f"{stem}.txt").write_text(to_text(model), encoding="utf-8")
    save_onnx(model, dump_dir / f"{stem}.onnx")
