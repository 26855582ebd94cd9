"""What several ranks on one host cost beside one: time of a step, and what INT8 keeps where each rank rounds its own part.

    python -m benchmarks.ranks --speed llama-1b --ranks 2          # a quiet machine, 5 minutes
    python -m benchmarks.ranks --accuracy --ranks 2 --ranks 3      # SmolLM2-135M

Speed: engines of one rank with all cores, and of N ranks that share them, in turns; each is loaded for its turn, as ranks that
wait take time from others. Accuracy: both against the float32 model on held-out text; and, of engines without quantization,
the largest difference of logits and whether 256 greedy tokens are the same. Writes ranks.json, beside what is there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import checkpoints, machine
from benchmarks.engines import SHAPES, SMOLLM2
from benchmarks.fetch_smollm2 import fetch
from benchmarks.methods import RESULTS, encoder, reference_logits
from benchmarks.tasks import Task
from benchmarks.text import windows
from compiler.accuracy import Comparison
from compiler.checkpoint import open_checkpoint
from compiler.driver import BuildRequest, build
from compiler.ranked_engine import RankedEngine
from runtime import Engine, SamplingParams, host
from runtime.profiling import read_bandwidth

TASKS = (Task("decode", 1, 32, 64), Task("decode, batch 8", 8, 32, 32), Task("prefill 512", 1, 512))
GREEDY = SamplingParams(temperature=0, repetition_penalty=1.0, max_new_tokens=256, ignore_eos=True)
WINDOWS, PROMPTS = 8, 4


def source(shape: str) -> Path:
    """Its checkpoint, made or fetched once."""
    return fetch(Path("build/smollm2")) if shape == SMOLLM2 else checkpoints.make(shape, Path("build/checkpoints") / shape)


def made(shape: str, ranks: int, preset: str) -> Path:
    """The engine for so many ranks."""
    target = "cpu" if ranks == 1 else f"cpux{ranks}"
    out = Path("build/engines") / f"ranks-{shape}-{preset}-{target}"
    return build(BuildRequest(source(shape), out, target=target, quantization=preset, force=True))


def load(engine: Path, ranks: int) -> Engine | RankedEngine:
    """It, ready to answer."""
    return Engine.load(engine) if ranks == 1 else RankedEngine(engine, ranks)


def speed(shape: str, counts: list[int], rounds: int) -> dict[str, Any]:
    """Seconds of a step by task and number of ranks, and the median of the ratios of neighbours in a round."""
    engines = {ranks: made(shape, ranks, "int8") for ranks in (1, *counts)}
    random = np.random.default_rng(0)
    samples: dict[str, dict[int, list[float]]] = {task.name: {ranks: [] for ranks in engines} for task in TASKS}
    bandwidths = [read_bandwidth(len(host.usable_cores()))]
    for number in range(rounds):
        for ranks in list(engines)[:: 1 if number % 2 == 0 else -1]:
            with load(engines[ranks], ranks) as engine:
                for task in TASKS:
                    task.run(engine, random, 4)  # type: ignore[arg-type]  # has generate
                    samples[task.name][ranks].append(round(task.run(engine, random), 6))  # type: ignore[arg-type]
        bandwidths.append(read_bandwidth(len(host.usable_cores())))
        print(f"round {number + 1}/{rounds}", file=sys.stderr, flush=True)
    ratios = {
        name: {ranks: round(statistics.median(several / one for several, one in zip(times[ranks], times[1], strict=True)), 4)
               for ranks in counts}
        for name, times in samples.items()
    }  # fmt: skip
    return {
        "shape": shape, "rounds": rounds, "time_over_one_rank": ratios, "samples": samples,
        "read_gb_per_second": [round(bandwidth / 1e9, 2) for bandwidth in bandwidths], "machine": machine.describe(),
    }  # fmt: skip


def accuracy(counts: list[int]) -> dict[str, Any]:
    """By number of ranks, what INT8 keeps on held-out text, and how far float32 engines are from one rank."""
    opened = open_checkpoint(source(SMOLLM2))
    judged = windows(encoder(opened), 0, WINDOWS)[1]
    found: dict[str, Any] = {"windows": WINDOWS, "int8": {}, "none": {}}
    with tempfile.TemporaryDirectory(dir="build") as folder:
        exact = reference_logits(opened, judged, Path(folder))
        alone: list[Any] = []
        for ranks in (1, *counts):
            comparison = Comparison()
            with load(made(SMOLLM2, ranks, "int8"), ranks) as engine:
                for ids, logits in zip(judged, exact, strict=True):
                    comparison.add(logits, torch.from_numpy(np.array(engine.logits(ids))), ids)
            found["int8"][ranks] = comparison.means()
            with load(made(SMOLLM2, ranks, "none"), ranks) as engine:
                answers = engine.generate([ids[:64] for ids in judged[:PROMPTS]], GREEDY)
                here = np.array(engine.logits(judged[0])), [result.token_ids for result in answers]
            alone = alone or list(here)
            difference = float(np.abs(here[0] - alone[0]).max() / np.abs(alone[0]).max())
            found["none"][ranks] = {"largest_difference": difference, "same_256_tokens": here[1] == alone[1]}
            print(f"{ranks} ranks: {found['int8'][ranks]}, {found['none'][ranks]}", flush=True)
    return found | {"machine": machine.describe()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--speed", choices=SHAPES, action="append", default=[], metavar="SHAPE", help="time this one; repeatable"
    )
    parser.add_argument("--accuracy", action="store_true")
    parser.add_argument("--ranks", type=int, action="append", help="2 by default; repeatable")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    path, counts = arguments.out / "ranks.json", arguments.ranks or [2]
    found = json.loads(path.read_text()) if path.is_file() else {"speed": {}, "accuracy": {}}
    for shape in arguments.speed:
        found["speed"][shape] = speed(shape, counts, arguments.rounds)
        print(shape, found["speed"][shape]["time_over_one_rank"])
    if arguments.accuracy:
        found["accuracy"] = accuracy(counts)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
