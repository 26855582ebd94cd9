"""The noise that weights of few bits have, by format: what a byte is worth in smaller groups, zero points or more bits.

    python -m benchmarks.int4_noise

Rounds some weights of SmolLM2-135M to nearest, in the basis that the compiler's rotation R1 gives them, in which they are close
to a normal distribution. Noise is the squared error relative to the squared weights. Writes results/int4-noise.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from belle_compile.passes.rotation.hadamard import Rotation
from benchmarks import machine
from benchmarks.engines import SMOLLM2
from benchmarks.peers.home import MODELS
from benchmarks.weight_formats import Format

RESULT = Path("benchmarks/results/int4-noise.json")
LAYERS = (3, 17)
READERS = (("input_layernorm", "self_attn.q_proj"), ("post_attention_layernorm", "mlp.gate_proj"))
FORMATS = (
    Format(4, 128), Format(4, 128, zeros=True), Format(4, 64), Format(4, 64, zeros=True), Format(4, 32),
    Format(4, 32, zeros=True), Format(4, 32, zeros=True, scale_bits=8), Format(4, 32, minimums=True, scale_bits=6),
    Format(5, 128), Format(6, 128), Format(8),
)  # fmt: skip


def rotated_weights(model: Path) -> Iterator[torch.Tensor]:
    """Weights of linears that read the residual stream, with the norm's gain and R1 in them."""
    with safe_open(model / "model.safetensors", "pt") as file:
        for layer in LAYERS:
            for norm, linear in READERS:
                gain, weight = (file.get_tensor(f"model.layers.{layer}.{name}.weight").float() for name in (norm, linear))
                yield torch.from_numpy(Rotation(weight.shape[1], 0).right((weight * gain).numpy()))


def noise(form: Format, weights: list[torch.Tensor]) -> dict[str, float]:
    """Bits a weight, and the mean noise."""
    outputs, inputs = weights[0].shape
    errors = [
        float((form.round_nearest(weight, torch.ones(inputs)) - weight).square().sum() / weight.square().sum())
        for weight in weights
    ]
    return {"bits": 8 * form.bytes_of(outputs, inputs) / outputs / inputs, "noise": sum(errors) / len(errors)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    weights = list(rotated_weights(MODELS / SMOLLM2))
    formats: dict[str, dict[str, float]] = {}
    for form in FORMATS:
        formats[str(form)] = row = noise(form, weights)
        print(f"{row['bits']:.3f} bits, noise {row['noise']:.5f}: {form}", flush=True)
    report: dict[str, Any] = {"model": SMOLLM2, "layers": LAYERS, "formats": formats, "machine": machine.describe()}
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
