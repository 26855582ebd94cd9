"""Speed of engines on this machine, by instruction set, each run beside a measurement of what limits it.

    python -m benchmarks.speed                                   # smollm2-135m llama-1b bloom-1b1
    python -m benchmarks.speed llama-7b --isa avx512vnni
    python -m benchmarks.speed llama-1b --rounds 1 --reuse --out /tmp/try

Engines of all instruction sets are loaded at once, warmed, and run in turns; every other round goes backwards. The limit is
measured among what it is compared with, since other users of a machine change it within seconds: memory is read before every
decoding step, which also leaves nothing of the step before in the caches; int8 products in registers are made before and after
a prefill. Both sides are means of a sample. The share of a decoding run is weights, keys and values of its steps over that
bandwidth, the share of a prefill its int8 operations over that rate. Loading is timed in fresh processes. Writes
speed-SHAPE.json, of which benchmarks.report makes the tables.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from belle_compile.runtime import Engine, host
from belle_compile.runtime.executors import ProfilableExecutor, StepBatch
from belle_compile.runtime.profiling import Phase
from belle_compile.runtime.program_json import read_program
from benchmarks import machine
from benchmarks.bandwidth import ReadBandwidth
from benchmarks.engines import DEFAULT_SHAPES, SHAPES, Cost, cost, prepare
from benchmarks.int8_rate import Int8Rate
from benchmarks.tasks import SWEEP, TASKS, Task

ROUNDS, LOADS = 5, 5
ASLEEP_S = 0.002  # threads without work sleep after a millisecond
RESULTS = Path("benchmarks/results")
Samples = dict[str, dict[str, list[dict[str, float]]]]  # task, instruction set


@dataclass(frozen=True)
class Limits:
    """The machine's limits at the moment of each run: memory, and products by instruction set."""

    memory: ReadBandwidth
    products: Mapping[str, Int8Rate]

    def beside(self, task: Task, engine: Engine, run: Callable[[], float]) -> tuple[float, float]:
        """(seconds of a decoding step or a prefill, the task's limit)."""
        if task.steps:
            with reading(engine, self.memory) as readings:
                seconds = run() - readings.paused_s / task.steps
            return seconds, readings.bandwidth
        assert isinstance(engine.executor, ProfilableExecutor), "an engine of a program"
        products = self.products[engine.executor.isa]
        before = products.measure(10)
        seconds = run()
        return seconds, (before + products.measure(10)) / 2

    def profiled(self, task: Task, engine: Engine, run: Callable[[], float]) -> dict[str, Any]:
        """Shares of a run: outside of kernels, and of each kind of kernel, with the read bandwidth beside it."""
        with reading(engine, self.memory) as readings, engine.profile() as profile:
            run()
        assert profile.result is not None
        phase = next(p for p in profile.result.phases if p.name == ("decode" if task.steps else "prefill"))
        bandwidth = readings.bandwidth if task.steps else profile.result.read_bytes_per_second / 1e9
        return _shares(phase, readings.paused_s, bandwidth)


@dataclass
class Readings:
    """Of memory, before steps."""

    memory: ReadBandwidth
    seconds: list[float] = field(default_factory=list)
    paused_s: float = 0.0

    @property
    def bandwidth(self) -> float:
        """GB/s, on average."""
        return self.memory.rate(self.seconds)

    def take(self) -> None:
        """Read, with pauses before and after in which the threads that wait for work go to sleep: engine and reading have
        some each, and only as many cores as one of them."""
        started = time.perf_counter()
        time.sleep(ASLEEP_S)
        began = time.perf_counter()
        self.memory.read()
        self.seconds.append(time.perf_counter() - began)
        time.sleep(ASLEEP_S)
        self.paused_s += time.perf_counter() - started


@contextlib.contextmanager
def reading(engine: Engine, memory: ReadBandwidth) -> Iterator[Readings]:
    """Read memory before every decoding step that follows."""
    executor, readings = engine.executor, Readings(memory)
    step = executor.step

    def read_and_step(batch: StepBatch) -> Any:
        if batch.tokens == batch.rows:
            readings.take()
        return step(batch)

    with mock.patch.object(executor, "step", read_and_step):
        yield readings


def measure(engine: Path, isas: tuple[str, ...], threads: int, tasks: tuple[Task, ...], rounds: int) -> dict[str, Any]:
    """All tasks on all instruction sets in turns: samples, medians, and one profile of each."""
    needed = cost(engine)
    tasks = tuple(task for task in tasks if _fits(task, engine))
    samples: Samples = {task.name: {isa: [] for isa in isas} for task in tasks}
    with contextlib.ExitStack() as stack:
        kv_tokens = max(task.kv_tokens for task in tasks)
        options: dict[str, Any] = {"threads": threads, "kv_tokens": kv_tokens, "prefix_cache": False}
        loaded = {isa: stack.enter_context(Engine.load(engine, isa=isa, **options)) for isa in isas}
        # After the engines: loading one asks for the permission that AMX needs.
        limits = Limits(ReadBandwidth(threads, mebibytes=1024), {isa: Int8Rate(isa, threads) for isa in isas})
        random = np.random.default_rng(0)
        for one in loaded.values():
            for task in tasks:
                if task.prompt <= 512:
                    task.run(one, random, steps=min(task.steps, 2))
        for number in range(rounds):
            for task in tasks:
                for isa in isas if number % 2 == 0 else reversed(isas):
                    seconds, limit = limits.beside(task, loaded[isa], partial(task.run, loaded[isa], random))
                    samples[task.name][isa].append(task.sample(seconds, needed, limit))
                    _say(engine, f"round {number + 1}/{rounds}, {task.name}, {isa}: {samples[task.name][isa][-1]}")
        profiles = {
            task.name: {isa: limits.profiled(task, one, partial(task.run, one, random)) for isa, one in loaded.items()}
            for task in tasks
        }
    return {
        "engine": engine.name,
        "threads": threads,
        "cost": _describe_cost(needed),
        "tasks": {task.name: task.describe() for task in tasks},
        "median": {name: {isa: _median(found) for isa, found in by_isa.items()} for name, by_isa in samples.items()},
        "profiles": profiles,
        "samples": samples,
    }


def loads(engine: Path, isas: tuple[str, ...], threads: int, count: int) -> dict[str, Any]:
    """Fresh processes up to their first token, in turns, the first of each (a cold file cache) left out."""
    found: dict[str, list[dict[str, float]]] = {isa: [] for isa in isas}
    for number in range(count + 1):
        for isa in isas:
            command = [sys.executable, "-m", "benchmarks.first_token", str(engine), "--isa", isa, "--threads", str(threads)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            if number:
                found[isa].append(json.loads(output))
    return {isa: {"median": _median(samples), "samples": samples} for isa, samples in found.items()}


def _shares(phase: Phase, paused_s: float, bandwidth: float) -> dict[str, Any]:
    """A profile without the `paused_s` seconds of readings in it; `bandwidth` in GB/s."""
    seconds = phase.seconds - paused_s
    kernels = {
        f"{kernel.kind} {kernel.rows}": {
            "share_of_step": round(kernel.seconds / seconds, 4),
            "gb_per_second": round(kernel.bytes_per_second / 1e9, 2),
            "share_of_bandwidth": round(kernel.bytes_per_second / 1e9 / bandwidth, 3) if kernel.bytes else None,
        }
        for kernel in phase.kernels
    }
    outside = round((phase.outside_s - paused_s) / seconds, 4)
    return {"outside_kernels": outside, "bandwidth": round(bandwidth, 2), "kernels": kernels}


def _describe_cost(needed: Cost) -> dict[str, Any]:
    cache = host.last_level_cache_bytes()
    return {
        "weight_bytes_per_step": needed.weight_bytes,
        "kv_bytes_per_token": needed.kv_bytes_per_token,
        "int8_operations_per_prompt_token": needed.operations_per_token,
        "weights_over_last_level_cache": round(needed.weight_bytes / cache, 1) if cache else None,
    }


def _fits(task: Task, engine: Path) -> bool:
    program = read_program(engine / "rank0")
    return task.prompt + task.steps + 1 <= program.max_context and task.batch <= min(program.max_rows, program.max_sequences)


def _median(samples: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(sample[key] for sample in samples) for key in samples[0]} if samples else {}


def _say(engine: Path, text: str) -> None:
    print(f"{engine.name}: {text}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--loads", type=int, default=LOADS, help="fresh processes per instruction set")
    parser.add_argument("--threads", type=int, default=len(host.usable_cores()))
    parser.add_argument("--isa", action="append", help="may be given several times; all of host and engine by default")
    parser.add_argument("--reuse", action="store_true", help="take engines in build/engines as they are")
    parser.add_argument("--sweep", action="store_true", help="batches and contexts for the scaling note, best instruction set")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    shapes = arguments.shapes or list(DEFAULT_SHAPES)
    if unknown := set(shapes) - set(SHAPES):
        parser.error(f"unknown shape {', '.join(sorted(unknown))}; expected some of {', '.join(SHAPES)}")
    for shape in shapes:
        engine = prepare(shape, reuse=arguments.reuse)
        carried = cost(engine).isas
        isas = tuple(arguments.isa or (isa for isa in host.host_isas() if isa in carried))
        isas = isas[:1] if arguments.sweep else isas
        tasks = SWEEP if arguments.sweep else TASKS
        report = measure(engine, isas, arguments.threads, tasks, arguments.rounds)
        report["loads"] = loads(engine, isas, arguments.threads, arguments.loads) if arguments.loads else {}
        name = f"sweep-{shape}-{arguments.threads}.json" if arguments.sweep else f"speed-{shape}.json"
        arguments.out.mkdir(parents=True, exist_ok=True)
        path = arguments.out / name
        path.write_text(json.dumps(report | {"machine": machine.describe()}, indent=2) + "\n")
        print(path)


if __name__ == "__main__":
    main()
