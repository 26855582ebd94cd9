"""Which passes run, in which order, and running them with the graph verified after each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from compiler.errors import CompileError
from compiler.ir.text import save_onnx, to_text
from compiler.ir.verify import verify
from passes.base import Pass, PassResult
from passes.calibration.data import CalibrationData
from passes.cleanup.merge_duplicates import MergeDuplicates
from passes.cleanup.remove_identities import RemoveIdentities
from passes.cleanup.remove_unused import RemoveUnused
from passes.fusion.fuse_activation_quantize import FuseActivationQuantize
from passes.fusion.fuse_add_norm import FuseAddNorm
from passes.fusion.fuse_dequantize import FuseDequantize
from passes.fusion.fuse_norm_quantize import FuseNormQuantize
from passes.fusion.fuse_projections import FuseProjections
from passes.quantization.gptq_rounding import GptqRounding
from passes.quantization.quantize_embedding import QuantizeEmbedding
from passes.quantization.quantize_linears import QuantizeLinears
from passes.rotation.fold_embedding_norm import FoldEmbeddingNorm
from passes.rotation.fold_layer_norms import FoldLayerNorms
from passes.rotation.rotate_residual import RotateResidual
from passes.rotation.rotate_values import RotateValues

# What follows matches a tidy graph
CLEANUP: tuple[Pass, ...] = (RemoveIdentities(), MergeDuplicates(), RemoveUnused())
# Spread outliers over all channels before there is anything to round; LayerNorm models are made RMSNorm models for it
ROTATION: tuple[Pass, ...] = (FoldEmbeddingNorm(), FoldLayerNorms(), RotateResidual(), RotateValues())
# W8A8 everywhere; the embedding after the linears: a tied head reads the same INT8 table
QUANTIZATION: tuple[Pass, ...] = (QuantizeLinears(), QuantizeEmbedding())
# Linears first, then what lies between them
FUSION: tuple[Pass, ...] = (FuseDequantize(), FuseProjections(), FuseAddNorm(), FuseNormQuantize(), FuseActivationQuantize())

PRESETS: Mapping[str, tuple[Pass, ...]] = {
    "int8": CLEANUP + ROTATION + QUANTIZATION + FUSION,
    "int8-a16": (*CLEANUP, *ROTATION, QuantizeLinears(activation_bits=16), QuantizeEmbedding(), *FUSION),
    "int8-plain": CLEANUP + QUANTIZATION + FUSION,
    "none": (*CLEANUP, FuseProjections(), FuseAddNorm()),
}


def calibrated(passes: Sequence[Pass], data: CalibrationData | None) -> tuple[Pass, ...]:
    """The passes with those that look at requests, where there are any: linears are rounded right before they are quantized."""
    if data is None:
        return tuple(passes)
    return tuple(one for step in passes for one in ((GptqRounding(data), step) if isinstance(step, QuantizeLinears) else (step,)))


# Hears of the graph as it is after a pass, and before the first one with nothing else; it may read the graph and not keep it.
OnPass = Callable[[Pass | None, ir.Model, PassResult | None], None]


def _unheard(step: Pass | None, model: ir.Model, result: PassResult | None) -> None:
    pass


def run_pipeline(
    model: ir.Model, passes: Sequence[Pass], dump_dir: Path | None = None, on_pass: OnPass = _unheard
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


def _dump(model: ir.Model, dump_dir: Path | None, number: int, name: str) -> None:
    if dump_dir is None:
        return
    dump_dir.mkdir(parents=True, exist_ok=True)
    stem = f"{number:02d}-{name}"
    (dump_dir / f"{stem}.txt").write_text(to_text(model), encoding="utf-8")
    save_onnx(model, dump_dir / f"{stem}.onnx")
