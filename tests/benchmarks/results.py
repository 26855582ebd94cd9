"""Results as benchmarks.speed writes them, with times made up by a known machine."""

from __future__ import annotations

from typing import Any

from benchmarks.engines import Cost
from benchmarks.tasks import SWEEP, TASKS, Task

FIXED_S, BANDWIDTH, TERAOPS = 0.001, 20e9, 2.0


KERNELS = {
    "qlinear T": {"share_of_step": 0.7, "gb_per_second": 19.0, "share_of_bandwidth": 0.95},
    "norm T": {"share_of_step": 0.1, "gb_per_second": 1.0, "share_of_bandwidth": 0.05},
    "attention T": {"share_of_step": 0.2, "gb_per_second": 12.0, "share_of_bandwidth": 0.6},
}


def speed(
    engine: str, weight_bytes: int, *, threads: int = 2, tasks: tuple[Task, ...] = TASKS, isas: int = 2
) -> dict[str, Any]:
    """A step takes 1 ms and its bytes at 20 GB/s, prefill runs at 1 of 2 TOP/s; the second instruction set is half as fast."""
    cost = Cost(weight_bytes, 20_000, 2 * weight_bytes, 1000, ("avx512vnni", "avx2"))
    samples: dict[str, Any] = {}
    for task in tasks:
        if task.steps:
            seconds, limit = FIXED_S + cost.decode_bytes(task.batch, task.context) / BANDWIDTH, BANDWIDTH / 1e9
        else:
            seconds, limit = cost.prefill_operations(task.prompt) / (TERAOPS / 2 * 1e12), TERAOPS
        samples[task.name] = {
            isa: [task.sample(seconds * (i + 1), cost, limit)] * 3 for i, isa in enumerate(("avx512vnni", "avx2")[:isas])
        }
    load = {"load_to_first_token_s": 0.25, "peak_mb": 1234.0}
    return {
        "engine": engine, "threads": threads,
        "cost": {"weight_bytes_per_step": weight_bytes, "kv_bytes_per_token": 20_000, "weights_over_last_level_cache": 1.5},
        "tasks": {task.name: task.describe() for task in tasks},
        "median": {name: {isa: found[0] for isa, found in by_isa.items()} for name, by_isa in samples.items()},
        "samples": samples,
        "profiles": {task.name: {"avx512vnni": {"outside_kernels": 0.02, "kernels": KERNELS}} for task in tasks},
        "loads": {isa: {"median": load} for isa in ("avx512vnni", "avx2")[:isas]},
        "machine": {"processor": "a processor", "memory_gib": 8, "system": "Linux", "date": "2026-01-01"},
    }  # fmt: skip


def sweep(engine: str, weight_bytes: int, threads: int) -> dict[str, Any]:
    return speed(engine, weight_bytes, threads=threads, tasks=SWEEP, isas=1) | {"loads": {}}
