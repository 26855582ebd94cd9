"""Engines with adapters on the GPU: their answers, whether these depend on what else is in a step, loading, and times.

python -m benchmarks.gpu_check.checks BUNDLE adapters/NAME FINDINGS
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from belle_compile.runtime.adapters.basis import EngineBasis
from belle_compile.runtime.adapters.factors import AdapterSlots, Factors
from belle_compile.runtime.adapters.peft import read_adapter
from belle_compile.runtime.executors.batch import NO_ADAPTER
from belle_compile.runtime.executors.cuda import CudaExecutor
from belle_compile.runtime.executors.kv_memory import KvMemory
from belle_compile.runtime.program import AdapterRegion
from benchmarks.gpu_check.driving import Plan, Sequences, follow
from benchmarks.gpu_check.findings import Findings

FOLDER = "adapters"  # of a bundle
NAMES, RANK = ("one", "two", "three"), 12  # of the adapters of a small engine, in their slots; a fourth sequence has none
SCALE = 50.0  # of their changes, so that they outweigh any error
TOKENS = 48
BATCH, SLOTS, LARGE_RANK, STEPS = 8, 4, 16, 64  # of the times

Floats = NDArray[np.float32]

# Each sequence alone in a step with one token, and with several; blocks of one row and of four.
PLAN: Plan = (
    {0: 5, 1: 1, 2: 9, 3: 3}, {0: 1, 1: 1, 2: 1, 3: 1}, {0: 17, 3: 1, 1: 30}, {0: 1, 1: 1, 2: 20, 3: 1},
    {0: 24, 1: 15, 2: 18, 3: 42},
)  # fmt: skip


def changes_of(engine: Path, name: str) -> Mapping[str, Factors]:
    """The changes of an adapter of a small engine."""
    return read_adapter(engine / name, EngineBasis.read(engine), RANK, SCALE).changes


def check_small(folder: Path, arch: str, findings: Findings, expected: Path, tolerance: tuple[float, float]) -> None:
    """Logits of sequences with several adapters and with none in the same steps, beside those expected; the bits of each are
    those that it has alone, and those that the adapter has in another slot, whose steps were recorded before."""
    with np.load(expected) as file:
        ids, wanted = file["ids"].tolist(), dict(zip((*NAMES, ""), file["logits"], strict=True))
    found: dict[str, Any] = {}
    findings.note(tolerance=list(tolerance), right=False)
    memory = KvMemory((len(NAMES) + 1) * (len(ids) + 16))
    with closing(CudaExecutor(folder / "rank0", [arch], kv_memory=memory, adapter_slots=len(NAMES))) as executor:
        slots = _slots(executor)
        for slot, name in enumerate(NAMES):
            slots.write(slot, changes_of(folder, name))
        _choose(executor, [*range(len(NAMES)), NO_ADAPTER])
        together = _logits(executor, ids, PLAN)
        for sequence, name in enumerate((*NAMES, "")):
            errors = np.abs(together[sequence] - wanted[name]).max(axis=1) / np.abs(wanted[name]).max()
            alone = _logits(executor, ids, [{sequence: step[sequence]} for step in PLAN if sequence in step])[sequence]
            found[name or "none"] = {
                "largest_error": float(errors.max()), "median_error": float(np.median(errors)),
                "same_bits_alone": same_bits(alone, together[sequence]),
            }  # fmt: skip
            findings.note_under("sequences", found)
        slots.write(0, changes_of(folder, NAMES[1]))
        again = _logits(executor, ids, [{0: step[1]} for step in PLAN if 1 in step])[0]
        found["two in the slot of one"] = {"same_bits_alone": same_bits(again, together[1])}
        findings.note_under("sequences", found)
    right = all(
        entry["same_bits_alone"]
        and entry.get("largest_error", 0) < tolerance[0]
        and entry.get("median_error", 0) < tolerance[1]
        for entry in found.values()
    )
    findings.note(right=right)


def same_bits(found: Floats, wanted: Floats) -> bool:
    """Whether two arrays have the same bits."""
    return found.tobytes() == wanted.tobytes()


def _slots(executor: CudaExecutor) -> AdapterSlots:
    assert executor.adapters is not None, "loaded with slots"
    return executor.adapters


def _choose(executor: CudaExecutor, slots: list[int]) -> None:
    """Give each of the first sequences the adapter in a slot."""
    assert executor.batch.adapters is not None, "loaded with slots"
    executor.batch.adapters[: len(slots)] = slots


def _logits(executor: CudaExecutor, text: list[int], plan: Plan) -> dict[int, Floats]:
    """The logits after each token of each sequence."""
    rows: dict[int, list[Floats]] = {}
    for sequence, _, logits in follow(executor, text, plan):
        rows.setdefault(sequence, []).append(logits)
    return {sequence: np.concatenate(each) for sequence, each in rows.items()}


def check_large(rank: Path, arch: str, findings: Findings) -> None:
    """Times of a step of several sequences without adapters, and with a few adapters of random values that change all linears;
    in turns."""
    with closing(CudaExecutor(rank, [arch], adapter_slots=SLOTS)) as executor:
        slots = _slots(executor)
        changes = {name: _random(region) for name, region in slots.layout.regions.items()}
        for slot in range(SLOTS):
            slots.write(slot, changes)
        seconds: dict[str, list[float]] = {"none": [], "all": []}
        for _ in range(3):
            for name, chosen in (("none", [NO_ADAPTER] * BATCH), ("all", [number % SLOTS for number in range(BATCH)])):
                _choose(executor, chosen)
                sequences = Sequences(executor, BATCH, 2 * STEPS)
                sequences.decode(8)
                seconds[name].append(sequences.decode(STEPS))
    none, all_linears = (float(np.median(seconds[name])) for name in ("none", "all"))
    key = f"decode, batch {BATCH}, {SLOTS} adapters of rank {LARGE_RANK} in all linears"
    findings.note_under(key, {"seconds": all_linears, "seconds_without": none, "ratio": none / all_linears})


def _random(region: AdapterRegion) -> Factors:
    numbers = (np.random.default_rng(0).standard_normal(1 << 20) / 100).astype(np.float32)
    a: Floats = np.resize(numbers, (LARGE_RANK, region.inputs))
    b: Floats = np.resize(numbers, (region.outputs, LARGE_RANK))
    return Factors(a, numbers[:LARGE_RANK], b)
