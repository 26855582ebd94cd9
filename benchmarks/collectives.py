"""What ranks of one host spend in the sums of a token: python -m benchmarks.collectives (a quiet machine, seconds)."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from belle_compile.compiler.backends.program.kernel import View
from belle_compile.compiler.backends.tvm.isa import AVX2
from belle_compile.compiler.backends.tvm.kernels.rows import GatherRows
from belle_compile.compiler.backends.tvm.library import compile_library
from belle_compile.runtime.distributed.collectives import MpiCollectives
from belle_compile.runtime.distributed.launcher import mpiexec
from belle_compile.runtime.executors.native import CallList, KernelLibrary, ThreadPool
from benchmarks import machine

TOKENS = 200  # of a sample
WIDTH, STRIDE = 2048, 2064  # of rows of activations
SHAPES = {  # sums and rows of each
    "decode, LLaMA-1.1B shape": (45, 1),
    "decode, batch 8, LLaMA-1.1B shape": (45, 8),
    "prefill 512, LLaMA-1.1B shape": (45, 512),
}


def measure(library: Path | None, samples: int) -> dict[str, list[float]]:
    """Milliseconds a token or prompt spends in its sums, median and best, as one rank of a run: in shared memory with what a
    kernel library has for that, or by messages."""
    ranks, found = MpiCollectives(shared=library is not None), {}
    memory = ranks.memory(4 * STRIDE * max(rows for _, rows in SHAPES.values())).view(np.float32).reshape(-1, STRIDE)
    for name, (sums, rows) in SHAPES.items():
        tokens = max(1, TOKENS // rows)
        add = summing(ranks, library, memory[:rows, :WIDTH], sums)
        taken = []
        for _ in range(1 + samples):
            add()  # begin together
            began = time.perf_counter()
            for _ in range(tokens):
                add()
            taken.append(1e3 * (time.perf_counter() - began) / tokens)
        found[name] = [float(np.median(taken[1:])), min(taken[1:])]
    if ranks.rank == 0:
        print(json.dumps(found))
    ranks.close()
    return found


def summing(ranks: MpiCollectives, library: Path | None, values: np.ndarray, sums: int) -> Callable[[], None]:
    """What makes the sums of a step."""
    if library is None or ranks.shared is None:

        def by_messages() -> None:
            for _ in range(sums):
                ranks.all_reduce(values)

        return by_messages
    kernels, count = KernelLibrary(library), np.array([len(values)], np.int32)
    places = [ranks.shared.address, values.ctypes.data, count.ctypes.data, values.shape[1], values.strides[0] // 4]
    calls = CallList(ThreadPool(kernels, 1), [(kernels.sum_address(), places)] * sums)

    def by_shared_memory() -> None:
        calls.run()
        assert count[0], "the list has this number's address"

    return by_shared_memory


def run(count: int, library: Path | None, samples: int) -> dict[str, list[float]]:
    """The same, by `count` processes."""
    command = [mpiexec(), "-n", str(count), sys.executable, "-m", "benchmarks.collectives", "--samples", str(samples)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--rank", str(library or "messages")], env=environment, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found: dict[str, list[float]] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--out", type=Path, help="write a JSON file, such as benchmarks/results/collectives.json")
    parser.add_argument("--rank", help=argparse.SUPPRESS)  # the kernel library or "messages"
    arguments = parser.parse_args()
    if arguments.rank:
        measure(None if arguments.rank == "messages" else Path(arguments.rank), arguments.samples)
        return
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="belle-sums-") as folder:
        library = Path(folder) / "kernels.so"
        library.write_bytes(
            compile_library([GatherRows(64, View(64), View(64))], AVX2)
        )  # any kernel: what adds up is in all libraries
        for way, path in (("shared memory", library), ("MPI messages", None)):
            results[way] = run(arguments.ranks, path, arguments.samples)
            for name, (median, best) in results[way].items():
                print(f"{name}, {arguments.ranks} ranks, {way}: {median:.3f} ms in sums, at best {best:.3f}")
    if arguments.out:
        whole = {"machine": machine.describe(), "ranks": arguments.ranks, "samples": arguments.samples, "ms": results}
        arguments.out.write_text(json.dumps(whole, indent=2) + "\n")


if __name__ == "__main__":
    main()
