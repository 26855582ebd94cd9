"""Whether exports should rotate a residual stream (R1) whose readers are smoothed: a model whose head is not tied.

    python -m benchmarks.stream_rotation --format compressed-tensors --seed 0 --seed 1
    python -m benchmarks.stream_rotation --format gguf --checkpoint tests/fixtures/tiny-bloom-trained

The head of a tied model is copied, which computes the same. Weights are rounded to nearest and inputs of linears while running,
as the format's runtime rounds them: for each channel and token, or in blocks. Each seed has requests of its own to calibrate
with (0: those of benchmarks.exports). KL to float32 is a mean over windows that no calibration saw. Results of earlier runs
stay in stream-rotation.json unless they are measured again. The machine may be busy: nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import tokenizers
import torch

from belle_compile.compiler.accuracy import Comparison
from belle_compile.compiler.checkpoint import open_checkpoint
from belle_compile.compiler.families import build_graph
from belle_compile.compiler.ir.build import make_initializer
from belle_compile.compiler.ir.ops import operand, spec_of
from belle_compile.compiler.ir.signature import Role
from belle_compile.compiler.ir.stream import ActivationStream, linears, quantized, rounded_blocks
from belle_compile.passes.base import Pass
from belle_compile.passes.calibration.data import CalibrationData
from belle_compile.passes.cleanup.merge_duplicates import MergeDuplicates
from belle_compile.passes.cleanup.remove_identities import RemoveIdentities
from belle_compile.passes.cleanup.remove_unused import RemoveUnused
from belle_compile.passes.quantization.scheme import BLOCK, INT8, INT8_BLOCKS
from belle_compile.passes.quantization.smooth_activations import SmoothActivations
from belle_compile.passes.rotation.reorder_channels import ReorderChannels
from belle_compile.passes.rotation.rotate_centered_residual import RotateCenteredResidual
from belle_compile.passes.rotation.rotate_residual import RotateResidual
from belle_compile.passes.rotation.rotate_values import RotateValues
from benchmarks import machine
from benchmarks.exports import CALIBRATED, CALIBRATION_WINDOW, HELD_OUT, WINDOW
from benchmarks.fetch_smollm2 import fetch
from benchmarks.text import HELD_OUT_EVERY, cut, documentation, windows

RESULTS = Path(__file__).parent / "results" / "stream-rotation.json"
CHANNELS, BLOCKS = "compressed-tensors", "gguf"
Tensor = torch.Tensor


def untied(checkpoint: Any) -> ir.Model:
    """The tidy float32 graph of a checkpoint, with a head of its own."""
    model = build_graph(checkpoint)
    for step in (RemoveIdentities(), MergeDuplicates(), RemoveUnused()):
        step.run(model)
    for node in model.graph:
        if spec_of(node).is_float_linear and node.outputs[0].is_graph_output():
            weight, index = operand(node, Role.WEIGHT), spec_of(node).index(Role.WEIGHT)
            assert weight is not None and weight.const_value is not None and index is not None
            if len(weight.uses()) > 1:
                copy = make_initializer(ir.Tensor(weight.const_value.numpy(), name=f"{weight.name}.copied"))
                model.graph.register_initializer(copy)
                node.replace_input_with(index, copy)
    return model


class Rounding:
    """How the runtime of a format rounds, and the KL of graphs to a float32 `model` over the windows `held_out`."""

    def __init__(self, format: str, model: ir.Model, held_out: Sequence[Sequence[int]], folder: Path) -> None:
        self.in_blocks, self._held_out, self._folder = format == BLOCKS, held_out, folder
        self._reference: dict[int, Tensor] = {}
        self._run(model, self._reference.__setitem__, rounded=False)

    def compared(self, model: ir.Model) -> dict[str, float]:
        comparison = Comparison()
        self._run(model, lambda i, logits: comparison.add(self._reference[i], logits, self._held_out[i]), rounded=True)
        return comparison.means()

    def _round(self, x: Tensor) -> Tensor:
        return rounded_blocks(x, BLOCK) if self.in_blocks else quantized(x, 8)

    def _is_rounded(self, linear: ir.Node) -> bool:
        return self.in_blocks or not linear.outputs[0].is_graph_output()  # the head of compressed-tensors keeps floats

    def _run(self, model: ir.Model, on_logits: Callable[[int, Tensor], None], *, rounded: bool) -> None:
        def on_linear(node: ir.Node, x: Tensor) -> Tensor:
            return self._round(x) if rounded and self._is_rounded(node) else x

        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            stream = ActivationStream(model, self._held_out, Path(folder))
            for number in range(len(stream.segments)):
                weights = stream.load(number)
                for node in linears(stream.segments[number]):
                    weight = operand(node, Role.WEIGHT)
                    if weight is not None and rounded and self._is_rounded(node):
                        weights[weight] = self._round(weights[weight])
                stream.forward(number, weights, on_linear=on_linear, on_logits=on_logits)
                stream.drop(number)


def ways(format: str, model: ir.Model, data: CalibrationData) -> Mapping[str, tuple[Pass, ...]]:
    """The passes of each way, by its name; `rotate-values` (R2) is part of all."""
    layer_norms = any(node.op_type == "LayerNormalization" for node in model.graph)
    rotate: Pass = RotateCenteredResidual() if layer_norms else RotateResidual()
    smooth: tuple[Pass, ...] = (SmoothActivations(data, weights=INT8_BLOCKS if format == BLOCKS else INT8),)
    smooth = (ReorderChannels(data), *smooth) if format == BLOCKS else smooth
    return {
        "smoothed": (*smooth, RotateValues()),
        "smoothed, then R1": (*smooth, rotate, RotateValues()),
        "R1, then smoothed": (rotate, *smooth, RotateValues()),
        "R1": (rotate, RotateValues()),
    }


def store(result: dict[str, Any]) -> None:
    """Write a result beside those of other ways, formats, models and seeds."""
    earlier = json.loads(RESULTS.read_text(encoding="utf-8"))["results"] if RESULTS.exists() else []
    keys = ("model", "format", "seed", "way")
    results = {tuple(found[key] for key in keys): found for found in (*earlier, result)}
    report = {"results": list(results.values()), "machine": machine.describe()}
    RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="[default: SmolLM2-135M]")
    parser.add_argument("--format", choices=[CHANNELS, BLOCKS], default=CHANNELS)
    parser.add_argument("--seed", type=int, action="append")
    parser.add_argument("--windows", type=int, default=6, help=f"of {WINDOW} tokens, at most {HELD_OUT}")
    arguments = parser.parse_args()
    checkpoint = open_checkpoint(arguments.checkpoint or fetch(Path("build/smollm2")))
    model, tokenizer = untied(checkpoint), tokenizers.Tokenizer.from_str(checkpoint.tokenizer_json)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    first, held_out = windows(encode, CALIBRATED, HELD_OUT)
    count = len(cut(encode(documentation())))
    others, _ = windows(encode, count - -(-count // HELD_OUT_EVERY), HELD_OUT)
    judged = [ids[:WINDOW] for ids in held_out[:: max(1, HELD_OUT // arguments.windows)][: arguments.windows]]
    with tempfile.TemporaryDirectory(dir="build") as folder:
        rounding = Rounding(arguments.format, model, judged, Path(folder))
        for seed in arguments.seed or [0]:
            chosen = random.Random(seed).sample(others, CALIBRATED) if seed else first
            sequences = tuple(tuple(ids[:CALIBRATION_WINDOW]) for ids in chosen)
            data = CalibrationData(sequences, str(seed), checkpoint.path.name, Path(folder) / f"seed-{seed}")
            for way, passes in ways(arguments.format, model, data).items():
                graph = model.clone()
                for step in passes:
                    step.run(graph)
                result = {"model": checkpoint.path.name, "format": arguments.format, "seed": seed, "way": way}
                result |= rounding.compared(graph)
                print(json.dumps(result), flush=True)
                store(result)


if __name__ == "__main__":
    main()
