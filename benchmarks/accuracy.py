"""INT8 engines against the fp32 model, and plain ones against a torch simulation of their arithmetic.

    python -m benchmarks.accuracy [ENGINE ...]          # artifacts/smollm2-135m-cpu
    python -m benchmarks.accuracy --checkpoint DIR --text FILE --out FILE ENGINE ...

Without `--checkpoint` the model is SmolLM2-135M; without `--text` the text is Python's own language documentation
(pydoc_data.topics). Text is teacher-forced in windows of 512 tokens.

Plain W8A8 is chaotic: a value that lies within a float32 rounding of the border between two integers takes the other one
when sums are added in another order, and the layers behind amplify that step. So two correct implementations agree in
how far they are from fp32, not token by token. The last row shows how much: the simulation against itself with its
embeddings changed by one part in 10 million.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from belle_compile.compiler.accuracy import Comparison
from belle_compile.runtime import Engine
from benchmarks import machine
from benchmarks.fetch_smollm2 import fetch
from benchmarks.simulation import load_fp32, logits, simulate

WINDOW = 512
RESULTS = Path(__file__).parent / "results"


def documentation_windows(engine: Engine, count: int) -> list[list[int]]:
    """`count` windows of token ids, spread over the topics in alphabetical order."""
    text = "\n\n".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics))
    return text_windows(engine, text[: 6000 * count * 4], count)


def text_windows(engine: Engine, text: str, count: int) -> list[list[int]]:
    """`count` windows of token ids, spread over the text."""
    ids = engine.encode(text, raw=True)
    step = len(ids) // count
    if step < WINDOW:
        raise SystemExit(f"accuracy: the text has {len(ids)} tokens, too few for {count} windows of {WINDOW}; give --windows")
    return [ids[i * step : i * step + WINDOW] for i in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", type=Path, nargs="*", default=[Path("artifacts/smollm2-135m-cpu")])
    parser.add_argument("--checkpoint", type=Path, help="what the engines were built from: a .gguf file or a directory")
    parser.add_argument("--text", type=Path, action="append", metavar="FILE", help="a file of text instead; repeatable")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--out", type=Path, default=RESULTS / "accuracy.json")
    arguments = parser.parse_args()
    checkpoint = arguments.checkpoint or fetch(Path("build/smollm2"))

    reference, simulation = load_fp32(checkpoint), simulate(load_fp32(checkpoint))
    nudge = torch.Generator().manual_seed(0)
    comparisons: dict[str, Comparison] = defaultdict(Comparison)
    with ExitStack() as stack:
        engines = {path.name: stack.enter_context(Engine.load(path)) for path in arguments.engines}
        first = next(iter(engines.values()))
        if arguments.text:
            text = "\n".join(file.read_text(encoding="utf-8") for file in arguments.text)
            windows = text_windows(first, text, arguments.windows)
        else:
            windows = documentation_windows(first, arguments.windows)
        for ids in windows:
            fp32 = logits(reference, ids, half_cache=False)
            simulated = logits(simulation, ids, half_cache=True)
            simulation.get_input_embeddings().nudge = nudge
            nudged = logits(simulation, ids, half_cache=True)
            simulation.get_input_embeddings().nudge = None
            comparisons["W8A8 simulation against fp32"].add(fp32, simulated, ids)
            comparisons["W8A8 simulation against itself, nudged"].add(simulated, nudged, ids)
            for name, engine in engines.items():
                ours = torch.from_numpy(np.array(engine.logits(ids)))
                comparisons[f"{name} against fp32"].add(fp32, ours, ids)
                if is_plain_w8a8(engine):
                    comparisons[f"{name} against the simulation"].add(simulated, ours, ids)
    source = ", ".join(file.name for file in arguments.text or ()) or "pydoc_data.topics"
    report = {
        "model": checkpoint.name,
        "text": f"{source}, {len(windows)} windows of {WINDOW} tokens",
        "results": {name: comparison.means() for name, comparison in comparisons.items()},
        "machine": machine.describe(),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report["results"], indent=2))


def is_plain_w8a8(engine: Engine) -> bool:
    """Whether the engine's arithmetic is the simulation's."""
    quantization = engine.manifest.quantization
    return quantization["scheme"] == "w8a8" and "rotations" not in quantization and quantization["kv_cache"] == "bfloat16"


if __name__ == "__main__":
    main()
