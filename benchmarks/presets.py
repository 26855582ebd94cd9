"""What a preset costs in speed beside the default, batch by batch: both engines loaded at once and run in turns.

    python -m benchmarks.presets llama-1b                        # int8-accurate against int8
    python -m benchmarks.presets smollm2-135m --preset int8-plain --rounds 9

A round runs every batch with both engines, one right after the other, and every other round the other one first. The ratio is
the median over rounds of the two times of a step that were taken next to each other. Writes presets-SHAPE-PRESET.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np

from belle_compile.runtime import Engine, host
from benchmarks import machine
from benchmarks.engines import DEFAULT_SHAPES, SHAPES, prepare
from benchmarks.speed import RESULTS
from benchmarks.tasks import Task

BASE = "int8"
TASKS = (*(Task(f"batch {batch}", batch, 32, 32) for batch in (1, 2, 4, 8)), Task("prefill 512", 1, 512))


def measure(engines: dict[str, Engine], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of a step (of the whole prefill) by task and preset, one a round."""
    random = np.random.default_rng(0)
    samples: dict[str, dict[str, list[float]]] = {task.name: {preset: [] for preset in engines} for task in TASKS}
    for number in range(-1, rounds):  # the first round warms up
        for task in TASKS:
            for preset in list(engines)[:: 1 if number % 2 == 0 else -1]:
                seconds = task.run(engines[preset], random)
                if number >= 0:
                    samples[task.name][preset].append(round(seconds, 6))
        print(f"round {number + 1}/{rounds}", file=sys.stderr, flush=True)
    return samples


def summarize(samples: dict[str, dict[str, list[float]]], preset: str) -> dict[str, dict[str, float]]:
    """Medians of both, and of the ratio of neighbours: over 1 where `preset` takes longer than the default."""
    found = {}
    for task, by_preset in samples.items():
        ratios = [slow / fast for slow, fast in zip(by_preset[preset], by_preset[BASE], strict=True)]
        medians = {f"{name}_s": statistics.median(times) for name, times in by_preset.items()}
        found[task] = medians | {"ratio": round(statistics.median(ratios), 4), "ratio_lowest": round(min(ratios), 4),
                                 "ratio_highest": round(max(ratios), 4)}  # fmt: skip
    return found


def compare(shape: str, preset: str, rounds: int, threads: int, reuse: bool) -> dict[str, Any]:
    """One shape, from its checkpoint to the summary."""
    kv_tokens = max(task.kv_tokens for task in TASKS)
    paths = {name: prepare(shape, preset=name, reuse=reuse) for name in (BASE, preset)}
    options: dict[str, Any] = {"threads": threads, "kv_tokens": kv_tokens, "prefix_cache": False}
    with Engine.load(paths[BASE], **options) as base:
        with Engine.load(paths[preset], **options) as other:
            samples = measure({BASE: base, preset: other}, rounds)
    return {
        "shape": shape,
        "preset": preset,
        "threads": threads,
        "rounds": rounds,
        "tasks": summarize(samples, preset),
        "samples": samples,
        "machine": machine.describe(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--preset", default="int8-accurate", help="compared with int8 (default: int8-accurate)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=len(host.usable_cores()))
    parser.add_argument("--reuse", action="store_true", help="take engines in build/engines as they are")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    shapes = arguments.shapes or list(DEFAULT_SHAPES)
    if unknown := set(shapes) - set(SHAPES):
        parser.error(f"unknown shape {', '.join(sorted(unknown))}; expected some of {', '.join(SHAPES)}")
    if arguments.preset == BASE:
        parser.error(f"{BASE} is what other presets are compared with")
    arguments.out.mkdir(parents=True, exist_ok=True)
    for shape in shapes:
        result = compare(shape, arguments.preset, arguments.rounds, arguments.threads, arguments.reuse)
        for task, found in result["tasks"].items():
            print(f"{shape}, {task}: {arguments.preset} takes {found['ratio']:.3f} of {BASE}'s time "
                  f"({found['ratio_lowest']:.3f} to {found['ratio_highest']:.3f})")  # fmt: skip
        (arguments.out / f"presets-{shape}-{arguments.preset}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
