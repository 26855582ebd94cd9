"""INT8 engine of SmolLM2-135M against the fp32 model and against a torch simulation of the same arithmetic.

    python -m benchmarks.accuracy [--engine artifacts/smollm2-135m-cpu]

Text: Python's own language documentation (pydoc_data.topics), teacher-forced in windows of 512 tokens.

Plain W8A8 is chaotic: a value that lies within a float32 rounding of the border between two integers takes the other one
when sums are added in another order, and the layers behind amplify that step. So two correct implementations agree in
how far they are from fp32, not token by token. The last row shows how much: the simulation against itself with its
embeddings changed by one part in 10 million.
"""

from __future__ import annotations

import argparse
import json
import math
import pydoc_data.topics
from pathlib import Path

import numpy as np
import torch

from benchmarks import machine
from benchmarks.fetch_smollm2 import fetch
from benchmarks.simulation import load_fp32, logits, simulate
from runtime import Engine

WINDOW = 512
RESULTS = Path(__file__).parent / "results"


def documentation_windows(engine: Engine, count: int) -> list[list[int]]:
    """`count` windows of token ids, spread over the topics in alphabetical order."""
    text = "\n\n".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics))
    ids = engine.encode(text[: 6000 * count * 4], raw=True)
    step = len(ids) // count
    assert step >= WINDOW, "text too short"
    return [ids[i * step : i * step + WINDOW] for i in range(count)]


class Comparison:
    """Running sums of how a model's predictions differ from the reference's."""

    def __init__(self) -> None:
        self.tokens, self.agree, self.kl, self.nll, self.reference_nll = 0, 0, 0.0, 0.0, 0.0

    def add(self, reference: torch.Tensor, other: torch.Tensor, ids: list[int]) -> None:
        p, q = torch.log_softmax(reference.double(), -1), torch.log_softmax(other.double(), -1)
        self.tokens += len(ids)
        self.agree += int((reference.argmax(-1) == other.argmax(-1)).sum())
        self.kl += float((p.exp() * (p - q)).sum())
        targets = torch.tensor(ids[1:])[:, None]
        self.reference_nll -= float(p[:-1].gather(1, targets).sum())
        self.nll -= float(q[:-1].gather(1, targets).sum())

    def result(self, windows: int) -> dict[str, float]:
        predicted = self.tokens - windows
        return {
            "tokens": self.tokens,
            "top1_agreement": round(self.agree / self.tokens, 4),
            "kl": round(self.kl / self.tokens, 5),
            "perplexity": round(math.exp(self.nll / predicted), 4),
            "perplexity_ratio": round(math.exp((self.nll - self.reference_nll) / predicted), 5),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", type=Path, default=Path("artifacts/smollm2-135m-cpu"))
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--out", type=Path, default=RESULTS / "accuracy.json")
    arguments = parser.parse_args()
    gguf = fetch(Path("build/smollm2"))

    reference, simulation = load_fp32(gguf), simulate(load_fp32(gguf))
    names = ("engine against fp32", "simulation against fp32", "engine against simulation", "simulation against itself, nudged")
    comparisons = {name: Comparison() for name in names}
    nudge = torch.Generator().manual_seed(0)
    with Engine.load(arguments.engine) as engine:
        windows = documentation_windows(engine, arguments.windows)
        for ids in windows:
            fp32 = logits(reference, ids, half_cache=False)
            simulated = logits(simulation, ids, half_cache=True)
            simulation.get_input_embeddings().nudge = nudge
            nudged = logits(simulation, ids, half_cache=True)
            simulation.get_input_embeddings().nudge = None
            ours = torch.from_numpy(np.array(engine.logits(ids)))
            comparisons["engine against fp32"].add(fp32, ours, ids)
            comparisons["simulation against fp32"].add(fp32, simulated, ids)
            comparisons["engine against simulation"].add(simulated, ours, ids)
            comparisons["simulation against itself, nudged"].add(simulated, nudged, ids)
    report = {
        "model": gguf.name,
        "text": f"pydoc_data.topics, {len(windows)} windows of {WINDOW} tokens",
        "results": {name: comparison.result(len(windows)) for name, comparison in comparisons.items()},
        "machine": machine.describe(),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report["results"], indent=2))


if __name__ == "__main__":
    main()
