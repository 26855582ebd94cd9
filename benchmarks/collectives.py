"""What ranks of one host spend in the sums of a token: python -m benchmarks.collectives (a quiet machine, seconds)."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine
from runtime.collectives import MpiCollectives
from runtime.launcher import mpiexec

TOKENS = 200  # of a sample
SHAPES = {"decode, LLaMA-1.1B shape": (45, 2048), "prefill 512, LLaMA-1.1B shape": (45, 512 * 2048)}  # sums, floats


def measure(shared: bool, samples: int) -> dict[str, list[float]]:
    """Milliseconds a token or prompt spends in its sums, median and best, as one rank of a run."""
    ranks, found = MpiCollectives(shared=shared), {}
    memory = ranks.memory(4 * max(size for _, size in SHAPES.values())).view(np.float32)
    for name, (sums, size) in SHAPES.items():
        values, tokens = memory[:size], max(1, TOKENS * 2048 // size)
        taken = []
        for _ in range(1 + samples):
            ranks.all_reduce(values)  # begin together
            began = time.perf_counter()
            for _ in range(tokens * sums):
                ranks.all_reduce(values)
            taken.append(1e3 * (time.perf_counter() - began) / tokens)
        found[name] = [float(np.median(taken[1:])), min(taken[1:])]
    if ranks.rank == 0:
        print(json.dumps(found))
    ranks.close()
    return found


def run(count: int, shared: bool, samples: int) -> dict[str, list[float]]:
    """The same, by `count` processes."""
    command = [mpiexec(), "-n", str(count), sys.executable, "-m", "benchmarks.collectives", "--samples", str(samples)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--rank", "shared" if shared else "messages"], env=environment, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found: dict[str, list[float]] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--out", type=Path, help="write a JSON file, such as benchmarks/results/collectives.json")
    parser.add_argument("--rank", choices=("shared", "messages"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        measure(arguments.rank == "shared", arguments.samples)
        return
    results: dict[str, Any] = {}
    for way, shared in (("shared memory", True), ("MPI messages", False)):
        results[way] = run(arguments.ranks, shared, arguments.samples)
        for name, (median, best) in results[way].items():
            print(f"{name}, {arguments.ranks} ranks, {way}: {median:.3f} ms in sums, at best {best:.3f}")
    if arguments.out:
        whole = {"machine": machine.describe(), "ranks": arguments.ranks, "samples": arguments.samples, "ms": results}
        arguments.out.write_text(json.dumps(whole, indent=2) + "\n")


if __name__ == "__main__":
    main()
