"""The plan that `belle-compile plan` shows: one line for each number of ranks."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from belle_compile.compiler.devices import Device
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.footprint import FIXED_BYTES, PROCESS_BYTES
from belle_compile.compiler.layers import preset
from belle_compile.compiler.plan.outline import outline
from belle_compile.compiler.plan.predict import Rates, Step, predict
from belle_compile.compiler.plan.rates import host_bandwidth, rates_of
from belle_compile.compiler.plan.work import RankWork, works_of
from belle_compile.compiler.targets import resolve
from belle_compile.compiler.terminal import columns, size

RANKS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Load:
    """What is served: sequences at a time, and tokens that each has on average."""

    batch: int
    context: int


def plan(path: str | Path, target: str, quantization: str, load: Load, kv_cache: str = "auto") -> dict[str, Any]:
    """Memory and times of a checkpoint, or of the dimensions in a config.json, on 1, 2, 4 and 8 devices of a target and on as
    many as its name says; a number of ranks that the model cannot have says why. Raises CompileError for wrong arguments."""
    device, asked, isas = resolve(target)
    checkpoint, recipe = outline(path), preset(quantization)
    lines, source, bandwidth = [], "", host_bandwidth(device)
    for ranks in sorted({*RANKS, asked}):
        if ranks > device.max_ranks:
            continue
        try:
            works = works_of(checkpoint, recipe, ranks, kv_cache, gpu=bool(device.compute_capability))
        except CompileError as error:
            lines.append({"ranks": ranks, "refused": str(error)})
            continue
        rates, source = rates_of(device, ranks, isas, bandwidth)
        lines.append({"ranks": ranks, **_line(works, rates, device, load)})
    return {
        "model": str(path),
        "target": device.name,
        "device": asdict(device),
        "quantization": quantization,
        "batch": load.batch,
        "context": load.context,
        "rates": source,
        "plan": lines,
    }


def _line(works: list[RankWork], rates: Rates, device: Device, load: Load) -> dict[str, Any]:
    """Of the rank that holds most, and of the one that takes longest: the others wait for it at every sum."""
    held = max(works, key=lambda work: work.weight_bytes)
    kv = load.batch * held.kv_bytes(load.context)
    needed = held.weight_bytes + kv + held.workspace_bytes + FIXED_BYTES + PROCESS_BYTES
    step, first = (max((_time(work, rates, len(works), load, prompt) for work in works), key=lambda step: step.seconds)
                   for prompt in (False, True))  # fmt: skip
    return {
        "weight_bytes": held.weight_bytes,
        "kv_bytes": kv,
        "workspace_bytes": held.workspace_bytes,
        "needed_bytes": needed,
        "fits": None if not device.memory else needed <= device.memory,
        "token_s": step.seconds,
        "tokens_per_second": load.batch / step.seconds,
        "memory_s": step.memory_s,
        "arithmetic_s": step.arithmetic_s,
        "calls_s": step.calls_s,
        "sums_s": step.sums_s,
        "first_token_s": first.seconds,
    }


def _time(work: RankWork, rates: Rates, ranks: int, load: Load, prompt: bool) -> Step:
    """Of a token of every sequence, or of one sequence's prompt of `context` tokens."""
    if not prompt:
        return predict(work, rates, ranks, sequences=load.batch, tokens=1, context=load.context)
    chunks = range(0, load.context, work.max_tokens)
    sizes = [min(work.max_tokens, load.context - start) for start in chunks]
    steps = [
        predict(work, rates, ranks, sequences=1, tokens=tokens, context=start + tokens // 2)
        for start, tokens in zip(chunks, sizes, strict=True)
    ]
    return Step(*(sum(getattr(step, name) for step in steps) for name in ("memory_s", "arithmetic_s", "calls_s", "sums_s")))


def text(found: dict[str, Any]) -> str:
    """For people."""
    memory = found["device"]["memory"]
    head = [
        f"{found['model']}, {found['quantization']}, on {found['device']['description']}"
        + (f" with {size(memory)} of memory each" if memory else ""),
        f"batch {found['batch']}, context {found['context']} tokens; rates {found['rates']}",
        "",
    ]
    names = ("ranks", "weights", "KV cache", "activations", "needed", "fits", "ms a token", "tokens/s", "memory", "arithmetic",
             "calls", "sums", "first token, ms")  # fmt: skip
    rows, notes = [], []
    for line in found["plan"]:
        if "refused" in line:
            notes.append(f"{line['ranks']} ranks: {line['refused']}")
            continue
        shares = [f"{100 * line[f'{part}_s'] / line['token_s']:.0f}%" for part in ("memory", "arithmetic", "calls", "sums")]
        sizes = [size(line[f"{part}_bytes"]) for part in ("weight", "kv", "workspace", "needed")]
        fits = {True: "yes", False: "no", None: "-"}[line["fits"]]
        times = [
            f"{1e3 * line['token_s']:.2f}",
            f"{line['tokens_per_second']:,.0f}",
            *shares,
            f"{1e3 * line['first_token_s']:,.0f}",
        ]
        rows.append((str(line["ranks"]), *sizes, fits, *times))
    return "\n".join([*head, columns([names, *rows]), *notes])
