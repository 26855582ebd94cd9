"""What `belle-compile plan` predicts beside what was measured, on this machine's results: python -m benchmarks.plan (seconds).

Reads speed-SHAPE.json (benchmarks.speed), ranks.json (benchmarks.ranks) and gpu-check.json (benchmarks.gpu_check), and writes
PLAN.md. A prediction has the model's dimensions and the number of ranks; on a CPU the instruction set and the read bandwidth
measured in the same run, and nothing fitted to the shape it is for; on a GPU what its maker says of it, and shares of that.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from belle_compile.compiler import backends
from belle_compile.compiler.devices import DEVICES, Device, Target
from belle_compile.compiler.families import build_graph
from belle_compile.compiler.plan.outline import outline
from belle_compile.compiler.plan.predict import Rates, predict
from belle_compile.compiler.plan.rates import rates_of
from belle_compile.compiler.plan.work import RankWork, plans_of
from belle_compile.passes.presets import find_preset
from benchmarks import checkpoints
from benchmarks.gpu_check.checks import BATCHES, CONTEXT, LARGE, PROMPTS, STEPS
from benchmarks.tasks import TASKS, Task

RESULTS = Path("benchmarks/results")
NAMED = {task.name: task for task in TASKS}


@dataclass(frozen=True)
class Row:
    """Seconds of a step (of a whole prompt in prefill), predicted and measured."""

    shape: str
    ranks: int
    task: str
    predicted: float
    measured: float
    read_gb: float
    sums: float

    @property
    def ratio(self) -> float:
        """Above 1 where it was faster in truth."""
        return self.predicted / self.measured


def works(shape: str, ranks: int, device: Device) -> list[RankWork]:
    """The work of each rank, by the dimensions of the shape."""
    dimensions = checkpoints.SHAPES[shape]
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.json"
        config.write_text(json.dumps(dimensions | checkpoints.COMMON[dimensions["model_type"]]))
        target = Target(device.name, device.isas, 1, device).with_ranks(ranks)
        plans = plans_of(build_graph(outline(config)), find_preset("int8").recipe, backends.estimator(device), target)
        return [plan.work for plan in plans if plan.work]


def reached_on(device: Device, ranks: int, isas: Sequence[str], read_gb: float) -> Rates:
    """The rates of each rank with the kernels of the device's default backend."""
    reached = backends.estimator(device).reached
    assert reached is not None, "both backends of programs were measured"
    return rates_of(reached, device, ranks, isas, 1e9 * read_gb)[0]


def row(shape: str, ranks: int, task: Task, isa: str, measured: float, read_gb: float) -> Row:
    """Of the rank that takes longest."""
    cpu = DEVICES["cpu"]
    rates = reached_on(cpu, ranks, (isa,), read_gb)
    tokens, context = (1, round(task.context)) if task.steps else (task.prompt, task.prompt // 2)
    each = works(shape, ranks, cpu)
    steps = [predict(work, rates, ranks, sequences=task.batch, tokens=tokens, context=context) for work in each]
    slowest = max(steps, key=lambda step: step.seconds)
    return Row(f"{shape}, {isa}", ranks, task.name, slowest.seconds, measured, read_gb, slowest.sums_s)


def of_speed(found: dict[str, Any], shape: str, isa: str = "avx512vnni") -> Iterator[Row]:
    """Of one rank; the limit of decoding is the bandwidth measured beside each sample."""
    limits = [sample["limit"] for name in NAMED if NAMED[name].steps for sample in found["samples"].get(name, {}).get(isa, [])]
    for name, samples in found["samples"].items():
        if name in NAMED and isa in samples:
            own = [sample["limit"] for sample in samples[isa]] if NAMED[name].steps else limits
            seconds = statistics.median(sample["seconds"] for sample in samples[isa])
            yield row(shape, 1, NAMED[name], isa, seconds, statistics.median(own))


def of_ranks(found: dict[str, Any], shape: str) -> Iterator[Row]:
    """Of one rank and of several."""
    read_gb = statistics.median(found["read_gb_per_second"])
    for name, by_ranks in found["samples"].items():
        for ranks, seconds in by_ranks.items():
            yield row(shape, int(ranks), NAMED[name], found["isa"], statistics.median(seconds), read_gb)


def device_of(gpu: str, free_bytes: int) -> Device:
    """The device that a driver calls `gpu` ("NVIDIA A100-SXM4-80GB"): of those so called, the smallest that has the memory."""
    words = gpu.lower().replace(" ", "").replace("geforce", "")
    called = [one for one in DEVICES.values() if one.name.partition("-")[0] in words]
    if not called:
        raise SystemExit(f"plan: {gpu} is none of the devices that `belle-compile targets` lists")
    return min(called, key=lambda one: (one.memory < free_bytes, one.memory))


def of_gpu(found: dict[str, Any]) -> Iterator[Row]:
    """Of the large model of a check."""
    device = device_of(found["device"]["gpu"], found["device"]["free_bytes"])
    shape = f"{LARGE}, {device.name}"
    rates = reached_on(device, 1, (), 0.0)
    (work,) = works(LARGE, 1, device)
    read_gb = max(one["copy_bytes_per_second"] for one in (found["device"], found[LARGE])) / 1e9
    for batch in BATCHES:
        if measured := found[LARGE].get(f"decode, batch {batch}", {}).get("seconds"):
            step = predict(work, rates, 1, sequences=batch, tokens=1, context=CONTEXT + 8 + STEPS // 2)
            yield Row(shape, 1, f"decode, batch {batch}", step.seconds, measured, read_gb, 0.0)
    for prompt in PROMPTS:
        step = predict(work, rates, 1, sequences=1, tokens=prompt, context=prompt // 2)
        if measured := found[LARGE].get(f"prefill {prompt}", {}).get("first_token_s"):
            yield Row(shape, 1, f"prefill {prompt}", step.seconds, measured, read_gb, 0.0)


def page(rows: Sequence[Row], machines: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "# Plans beside measurements",
        "",
        "Written by `python -m benchmarks.plan` from speed-SHAPE.json, ranks.json and gpu-check.json; do not edit.",
        "Milliseconds of a decoding step, and of a whole prompt in prefill. On CPUs predicted with the read bandwidth measured",
        "in the same run; on GPUs with the device's own figures, and what stands here as read GB/s is how fast it copied.",
        "",
        "| shape | ranks | work | read GB/s | predicted ms | of it sums | measured ms | predicted / measured |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in rows:
        times = f"{1e3 * one.predicted:.1f} | {1e3 * one.sums:.2f} | {1e3 * one.measured:.1f} | {one.ratio:.2f}"
        lines.append(f"| {one.shape} | {one.ranks} | {one.task} | {one.read_gb:.1f} | {times} |")
    lines += ["", "Measured:", ""]
    lines += [f"- {name}: {m['processor']}, {m['system']}, {m['date']}, `{m['command']}`" for name, m in machines.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    rows: list[Row] = []
    machines: dict[str, dict[str, Any]] = {}
    for path in sorted(arguments.results.glob("speed-*.json")):
        shape, found = path.stem.removeprefix("speed-"), json.loads(path.read_text())
        if shape in checkpoints.SHAPES:  # others have no dimensions without their checkpoint
            rows += of_speed(found, shape)
            machines[path.name] = found["machine"]
    ranks = arguments.results / "ranks.json"
    if ranks.is_file():
        for shape, found in json.loads(ranks.read_text())["speed"].items():
            rows += of_ranks(found, shape)
            machines[f"ranks.json, {shape}"] = found["machine"]
    check = arguments.results / "gpu-check.json"
    if check.is_file():
        found = json.loads(check.read_text())
        rows += of_gpu(found)
        machines[check.name] = {
            "processor": found["device"]["gpu"], "system": f"CUDA {found['device']['cuda_of_driver']}",
            "date": found["about"]["date"], "command": "python -m benchmarks.gpu_check build/gpu-check-h100",
        }  # fmt: skip
    (arguments.results / "PLAN.md").write_text(page(rows, machines))
    print(page(rows, machines))


if __name__ == "__main__":
    main()
