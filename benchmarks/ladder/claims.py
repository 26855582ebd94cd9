"""What single optimizations give, each beside the same without it: attention with a KV cache, fused kernels, INT8."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from belle_compile.runtime import Engine
from belle_compile.runtime.artifact import read_manifest
from belle_compile.runtime.profiling import KernelTime, Phase
from benchmarks.ladder.ways import greedy
from benchmarks.tasks import Task

CONTEXT = 100  # tokens, of the claim on the KV cache
STEPS = 16  # that a profile is the mean of
PROMPT = 32
# Kinds of kernels by what they compute. Fused ones have the kind of the op that they end in or are made around: a norm adds
# the residual and quantizes, an activation quantizes, a product of integers is scaled and gets its bias.
GROUPS: Mapping[str, tuple[str, ...]] = {
    "linear layers": ("linear", "qlinear", "glinear", "dequantize"),
    "norms, additions and their rounding": ("norm", "add", "quantize"),
    "GELU or SwiGLU and its rounding": ("activation",),
    "attention": ("attention", "attention_alone", "attention_runs", "append_kv", "rotary"),
}
OTHER = "all else"


def attention_pairs(tokens: int) -> tuple[int, int]:
    """Products of a query and a key in one head for the next token after `tokens`: computing all again, and with a KV cache.

    A query sees the keys up to its own.
    """
    return tokens * (tokens + 1) // 2, tokens


def by_group(kernels: Sequence[KernelTime], steps: int) -> dict[str, dict[str, float]]:
    """Kernel calls and milliseconds of a step by `GROUPS`."""
    found: dict[str, dict[str, float]] = {}
    for kernel in kernels:
        group = next((name for name, kinds in GROUPS.items() if kernel.kind in kinds), OTHER)
        sums = found.setdefault(group, {"calls": 0.0, "ms": 0.0})
        sums["calls"] += kernel.calls / steps
        sums["ms"] += 1000 * kernel.seconds / steps
    return found


def _profiled(engine: Engine, chance: np.random.Generator, prompt: int, tokens: int) -> dict[str, Phase]:
    """The phases of one request of random tokens."""
    ids = chance.integers(5, min(250, engine.executor.vocab_size), prompt).tolist()
    with engine.profile() as profile:
        engine.generate([ids], greedy(tokens))
    assert profile.result is not None
    return {phase.name: phase for phase in profile.result.phases}


def kv_cache(engine: Engine, rounds: int) -> dict[str, Any]:
    """Attention for one more token after `CONTEXT`, with all tokens computed again and with their keys and values kept."""
    chance = np.random.default_rng(0)
    again: list[float] = []
    kept: list[float] = []
    for _ in range(rounds):
        phases = _profiled(engine, chance, CONTEXT, STEPS)
        for times, phase in ((again, phases["prefill"]), (kept, phases["decode"])):
            spent = sum(kernel.seconds for kernel in phase.kernels if kernel.kind in GROUPS["attention"])
            times.append(1000 * spent / phase.steps)
    pairs = attention_pairs(CONTEXT)
    medians = statistics.median(again), statistics.median(kept)
    return {
        "context": CONTEXT, "pairs_again": pairs[0], "pairs_kept": pairs[1], "work_saved": round(1 - pairs[1] / pairs[0], 4),
        "attention_again_ms": round(medians[0], 4), "attention_kept_ms": round(medians[1], 4),
        "time_saved": round(1 - medians[1] / medians[0], 4),
    }  # fmt: skip


def fusion(engines: Mapping[str, Engine], folders: Mapping[str, Path], rounds: int) -> dict[str, Any]:
    """Kernel calls and times of a decoding step by group, unfused and fused, for one precision after the other."""
    chance, found = np.random.default_rng(1), {}
    for precision in ("float32", "int8"):
        sums: dict[str, list[dict[str, dict[str, float]]]] = {"unfused": [], "fused": []}
        names = {"unfused": f"{precision}-unfused", "fused": precision}
        for number in range(rounds):
            for which in ("unfused", "fused") if number % 2 == 0 else ("fused", "unfused"):
                phase = _profiled(engines[names[which]], chance, PROMPT, STEPS)["decode"]
                sums[which].append(by_group(phase.kernels, phase.steps))
        groups = [group for group in (*GROUPS, OTHER) if any(group in one for one in sums["unfused"])]
        calls = read_manifest(folders[precision]).kernel_calls
        found[precision] = {
            "kernel_calls": {"before": calls.before, "after": calls.after},
            "groups": {group: {which: _medians(times, group) for which, times in sums.items()} for group in groups},
        }
    return found


def _medians(times: Sequence[dict[str, dict[str, float]]], group: str) -> dict[str, float]:
    return {key: round(statistics.median(one.get(group, {}).get(key, 0.0) for one in times), 4) for key in ("calls", "ms")}


def int8(engines: Mapping[str, Engine], rounds: int) -> dict[str, Any]:
    """How much faster INT8 is than float32, both fused: a token of one sequence, and a prompt."""
    chance, found = np.random.default_rng(2), {}
    for task in (Task("decode", 1, PROMPT, STEPS), Task("prefill 512", 1, 512)):
        times: dict[str, list[float]] = {"float32": [], "int8": []}
        for number in range(rounds):
            for which in ("float32", "int8") if number % 2 == 0 else ("int8", "float32"):
                times[which].append(task.run(engines[which], chance))
        ratios = [a / b for a, b in zip(times["float32"], times["int8"], strict=True)]
        found[task.name] = {
            **{f"{which}_ms": round(1000 * statistics.median(values), 4) for which, values in times.items()},
            "ratio": round(statistics.median(ratios), 3),
        }
    return found


def measure(folders: Mapping[str, Path], threads: int | None, rounds: int) -> dict[str, Any]:
    """Measure all claims on the engines of a model, by their names in `steps.ENGINES`."""
    with ExitStack() as stack:
        engines: dict[str, Engine] = {}
        for name in ("float32-unfused", "float32", "int8-unfused", "int8"):
            engines[name] = stack.enter_context(Engine.load(folders[name], threads=threads, prefix_cache=False))
        return {
            "kv_cache": kv_cache(engines["int8"], rounds),
            "fusion": fusion(engines, folders, rounds),
            "int8": int8(engines, rounds),
        }
