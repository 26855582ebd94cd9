"""What several ranks on one host cost beside one: time of a step, and what INT8 keeps where each rank rounds its own part.

    python -m benchmarks.ranks --speed llama-1b --ranks 2                               # a quiet machine, 6 minutes
    python -m benchmarks.ranks --accuracy smollm2-135m --ranks 2 --ranks 3              # 4 minutes
    python -m benchmarks.ranks --accuracy tiny-bloom-trained --ranks 2 --ranks 4        # 1 minute

Speed: engines of one rank with all cores, and of N ranks that share them, in short turns, since other users of a machine change
it within seconds; processes of those whose turn it is not are stopped. Ranks wait for the slowest of them, where threads of one
rank take work from each other, so beside each turn stands how even the cores were: the slowest core's rate of int8 products in
registers over the fastest one's, all of them busy. Accuracy: both against the float32 model on held-out text; and, of engines
without quantization, the largest difference of logits and whether 256 greedy tokens are the same. Writes ranks.json, beside
what is there.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from belle_compile.compiler.accuracy import Comparison
from belle_compile.compiler.checkpoint import open_checkpoint
from belle_compile.compiler.driver import BuildRequest, build
from belle_compile.compiler.ranked_engine import RankedEngine
from belle_compile.runtime import Engine, SamplingParams, host
from belle_compile.runtime.executors import cpu
from benchmarks import checkpoints, machine
from benchmarks.bandwidth import ReadBandwidth
from benchmarks.engines import SHAPES, SMOLLM2
from benchmarks.fetch_smollm2 import fetch
from benchmarks.int8_rate import CoreRate
from benchmarks.methods import RESULTS, encoder, reference_logits
from benchmarks.processes import descendants
from benchmarks.tasks import Task
from benchmarks.text import cut, windows

TASKS = (Task("decode", 1, 32, 16), Task("decode, batch 8", 8, 32, 8), Task("prefill 512", 1, 512))
GREEDY = SamplingParams(temperature=0, repetition_penalty=1.0, max_new_tokens=256, ignore_eos=True)
WINDOWS, PROMPTS = 8, 4
BLOOM = Path("tests/fixtures/tiny-bloom-trained")
SETTLING_S = 30  # a virtual machine gives memory that was freed back to its host some seconds later, which takes time from both


def source(shape: str) -> Path:
    """Its checkpoint, made or fetched once."""
    if shape == BLOOM.name:
        return BLOOM
    return fetch(Path("build/smollm2")) if shape == SMOLLM2 else checkpoints.make(shape, Path("build/checkpoints") / shape)


def made(shape: str, ranks: int, preset: str, reuse: bool = False) -> Path:
    """The engine for so many ranks, with kernels for the best instruction set of this host; `reuse` keeps one that is there."""
    target = "cpu" if ranks == 1 else f"cpux{ranks}"
    out = Path("build/engines") / f"ranks-{shape}-{preset}-{target}"
    if reuse and (out / "manifest.json").is_file():
        return out
    best = host.host_isas()[:1]
    return build(BuildRequest(source(shape), out, target=target, quantization=preset, isas=best, force=True))


def load(engine: Path, ranks: int) -> Engine | RankedEngine:
    """It, ready to answer."""
    return Engine.load(engine, prefix_cache=False) if ranks == 1 else RankedEngine(engine, ranks)


class Turns:
    """Engines by their number of ranks, of which one runs at a time."""

    def __init__(self, engines: dict[int, Path], stack: ExitStack) -> None:
        self._engines: dict[int, Engine | RankedEngine] = {}
        self._processes: dict[int, list[int]] = {}
        for ranks, engine in engines.items():
            before = set(descendants(os.getpid()))
            self._engines[ranks] = loaded = load(engine, ranks)
            stack.callback(loaded.close)
            self._processes[ranks] = sorted(set(descendants(os.getpid())) - before)
            stack.callback(self._signal, ranks, signal.SIGCONT)  # before it is closed
            self._signal(ranks, signal.SIGSTOP)

    def run(self, ranks: int, task: Task, random: np.random.Generator) -> float:
        """Seconds of a step, after a few that are not timed."""
        self._signal(ranks, signal.SIGCONT)
        engine: Any = self._engines[ranks]
        task.run(engine, random, 2)
        seconds = task.run(engine, random)
        self._signal(ranks, signal.SIGSTOP)
        return seconds

    def _signal(self, ranks: int, number: signal.Signals) -> None:
        for process in self._processes[ranks]:
            os.kill(process, number)


def speed(shape: str, counts: list[int], rounds: int, reuse: bool) -> dict[str, Any]:
    """Seconds of a step by task and number of ranks, and the median of the ratios of neighbours in a round."""
    engines = {ranks: made(shape, ranks, "int8", reuse) for ranks in (1, *counts)}
    random, cores = np.random.default_rng(0), host.usable_cores()
    samples: dict[str, dict[int, list[float]]] = {task.name: {ranks: [] for ranks in engines} for task in TASKS}
    evenness: dict[str, list[float]] = {task.name: [] for task in TASKS}
    isa = host.host_isas()[0]
    cpu.allow_amx()
    rates, memory, bandwidths = [CoreRate(isa, core) for core in cores], ReadBandwidth(len(cores), mebibytes=1024), []
    with ExitStack() as stack:
        turns = Turns(engines, stack)
        time.sleep(SETTLING_S)
        for number in range(rounds):
            for task in TASKS:
                before = even(rates)
                order = list(engines)[:: 1 if number % 2 == 0 else -1]
                times = {ranks: turns.run(ranks, task, random) for ranks in order}
                for ranks, seconds in times.items():
                    samples[task.name][ranks].append(round(seconds, 6))
                evenness[task.name].append(round((before + even(rates)) / 2, 3))
            bandwidths.append(round(memory.measure(), 2))
            print(f"round {number + 1}/{rounds}", file=sys.stderr, flush=True)
    ratios = {
        name: {ranks: round(statistics.median(several / one for several, one in zip(times[ranks], times[1], strict=True)), 4)
               for ranks in counts}
        for name, times in samples.items()
    }  # fmt: skip
    return {
        "shape": shape, "isa": isa, "rounds": rounds, "time_over_one_rank": ratios, "samples": samples,
        "evenness_of_cores": evenness, "read_gb_per_second": bandwidths, "machine": machine.describe(),
    }  # fmt: skip


def even(rates: list[CoreRate]) -> float:
    """The slowest core's rate over the fastest one's, all at once."""
    with ThreadPoolExecutor(len(rates)) as threads:
        found = list(threads.map(CoreRate.measure, rates))
    return min(found) / max(found)


def held_out(model: str, encode: Callable[[str], list[int]]) -> list[list[int]]:
    """Windows of text that the model was not trained with, for the tiny BLOOM as many as there are."""
    if model == SMOLLM2:
        return windows(encode, 0, WINDOWS)[1]
    return cut([number for file in sorted(BLOOM.glob("heldout-*.txt")) for number in encode(file.read_text(encoding="utf-8"))])


def accuracy(model: str, counts: list[int], reuse: bool) -> dict[str, Any]:
    """By number of ranks, what INT8 keeps on held-out text, and how far float32 engines are from one rank."""
    opened = open_checkpoint(source(model))
    judged = held_out(model, encoder(opened))
    found: dict[str, Any] = {"windows": len(judged), "int8": {}, "none": {}}
    with tempfile.TemporaryDirectory(dir="build") as folder:
        exact = reference_logits(opened, judged, Path(folder))
        alone: list[Any] = []
        for ranks in (1, *counts):
            comparison = Comparison()
            with load(made(model, ranks, "int8", reuse), ranks) as engine:
                for ids, logits in zip(judged, exact, strict=True):
                    comparison.add(logits, torch.from_numpy(np.array(engine.logits(ids))), ids)
            found["int8"][ranks] = comparison.means()
            with load(made(model, ranks, "none", reuse), ranks) as engine:
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
    parser.add_argument(
        "--accuracy", choices=(SMOLLM2, BLOOM.name), action="append", default=[], metavar="MODEL",
        help="what INT8 keeps of this one; repeatable",
    )  # fmt: skip
    parser.add_argument("--ranks", type=int, action="append", help="2 by default; repeatable")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--reuse", action="store_true", help="take engines in build/engines as they are")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    path, counts = arguments.out / "ranks.json", arguments.ranks or [2]
    found = json.loads(path.read_text()) if path.is_file() else {"speed": {}, "accuracy": {}}
    for shape in arguments.speed:
        found["speed"][shape] = speed(shape, counts, arguments.rounds, arguments.reuse)
        print(shape, found["speed"][shape]["time_over_one_rank"])
    for model in arguments.accuracy:
        found["accuracy"][model] = accuracy(model, counts, arguments.reuse)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
