"""The plan of a model on a target: one line for each number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from belle_compile.compiler import backends
from belle_compile.compiler.devices import Device, Target
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.families import build_graph
from belle_compile.compiler.integers import integer_plan
from belle_compile.compiler.kv_types import AUTO
from belle_compile.compiler.plan.outline import outline
from belle_compile.compiler.plan.predict import Rates, Step, predict
from belle_compile.compiler.plan.rates import host_bandwidth, rates_of
from belle_compile.compiler.plan.work import RankPlan, RankWork, plans_of
from belle_compile.compiler.reading import PLAIN, Reading
from belle_compile.compiler.targets import resolve
from belle_compile.passes.presets import recipe_of
from belle_compile.runtime.capacity.curve import Capacity

RANKS = (1, 2, 4, 8)
# Keys of the predicted times in a line of the plan
_TIMES = ("token_s", "tokens_per_second", "memory_s", "arithmetic_s", "calls_s", "sums_s", "first_token_s")


@dataclass(frozen=True)
class Load:
    """The load to serve: `batch` sequences at a time, of `context` tokens on average. What was `measured` of an engine is shown
    beside the predictions for its levels, on the number of ranks in the target's name."""

    batch: int
    context: int
    measured: Capacity | None = None


def plan(
    path: str | Path,
    target: str,
    quantization: str,
    load: Load,
    kv_cache: str = AUTO,
    backend: str | None = None,
    reading: Reading = PLAIN,
    methods: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Predict memory and times of a checkpoint, or of the dimensions in a config.json, on a target's device.

    The plan has one line for 1, 2, 4 and 8 ranks each and for the number in the target's name. A line holds bytes and seconds,
    or the reason why the model cannot be divided among that many ranks. Times are None where the backend (None: the device's
    default) predicts none. `reading` says how the checkpoint is read. `methods` are those of a build with calibration; None
    stands for the preset's own in a build without. Raises CompileError for wrong arguments.
    """
    device, named_ranks, isas = resolve(target)
    chosen = backends.estimator(device, backend)
    backends.check_kv_cache(chosen, kv_cache)
    graph = build_graph(outline(path, reading))
    asked = recipe_of(quantization, methods, calibrated=True).applied(calibrated=methods is not None)
    recipe = integer_plan(graph, asked, methods).recipe
    lines, source, measured, bandwidth = [], "", None, host_bandwidth(device) if chosen.reached else 0.0
    for ranks in sorted({*RANKS, named_ranks}):
        if ranks > device.max_ranks:
            continue
        on_ranks = Target(device.name, isas or device.isas, 1, device).with_ranks(ranks)
        try:
            backends.check(chosen, on_ranks, recipe)
            plans = plans_of(graph, recipe, chosen, on_ranks, kv_cache)
        except CompileError as error:
            lines.append({"ranks": ranks, "refused": str(error)})
            continue
        line = {"ranks": ranks, **_memory(plans, device, load)}
        works = [rank.work for rank in plans if rank.work]
        if chosen.reached and works:
            rates, source = rates_of(chosen.reached, device, ranks, isas, bandwidth)
            line |= _times(works, rates, load)
            measured = _measured(load.measured, works, rates) if ranks == named_ranks else measured
        lines.append(line)
    return {
        "model": str(path),
        "target": device.name,
        "backend": chosen.name,
        "device": asdict(device),
        "quantization": quantization,
        "methods": list(recipe.methods),
        "batch": load.batch,
        "context": load.context,
        "rates": source,
        "plan": lines,
        "measured": measured,
    }


def _measured(curve: Capacity | None, works: list[RankWork], rates: Rates) -> dict[str, Any] | None:
    """The levels of a curve, each beside the prediction for as many sequences, which have their prompts and half of their
    answers on average."""
    if curve is None:
        return None
    context = curve.prompt_tokens + curve.answer_tokens // 2
    levels = [
        {
            "users": level.users,
            "predicted_token_s": _times(works, rates, Load(level.users, context))["token_s"],
            "token_s": level.token_s.p50,
            "tokens_per_second": level.tokens_per_s,
        }
        for level in curve.levels
    ]
    return {"host": curve.host, "engine": curve.engine, "date": curve.date, "levels": levels}


def _memory(plans: list[RankPlan], device: Device, load: Load) -> dict[str, Any]:
    """The memory of the rank that needs most."""
    need = max((rank.footprint.memory(load.batch, load.context) for rank in plans), key=lambda need: need.total)
    return {
        "weight_bytes": need.weights,
        "kv_bytes": need.kv_cache,
        "workspace_bytes": need.activations,
        "reserve_bytes": need.reserve,
        "needed_bytes": need.total,
        "resident_bytes": need.resident,
        "fits": None if not device.memory else need.total <= device.memory,
        **dict.fromkeys(_TIMES),
    }


def _times(works: list[RankWork], rates: Rates, load: Load) -> dict[str, float]:
    """The times of the slowest rank: the others wait for it at every sum."""
    step, first = (max((_time(work, rates, len(works), load, prompt) for work in works), key=lambda step: step.seconds)
                   for prompt in (False, True))  # fmt: skip
    times = (
        step.seconds,
        load.batch / step.seconds,
        step.memory_s,
        step.arithmetic_s,
        step.calls_s,
        step.sums_s,
        first.seconds,
    )
    return dict(zip(_TIMES, times, strict=True))


def _time(work: RankWork, rates: Rates, ranks: int, load: Load, prompt: bool) -> Step:
    """The time of one token for every sequence, or with `prompt` that of one sequence's prompt of `context` tokens."""
    if not prompt:
        return predict(work, rates, ranks, sequences=load.batch, tokens=1, context=load.context)
    chunks = range(0, load.context, work.max_tokens)
    sizes = [min(work.max_tokens, load.context - start) for start in chunks]
    steps = [
        predict(work, rates, ranks, sequences=1, tokens=tokens, context=start + tokens // 2)
        for start, tokens in zip(chunks, sizes, strict=True)
    ]
    return Step(*(sum(getattr(step, name) for step in steps) for name in ("memory_s", "arithmetic_s", "calls_s", "sums_s")))
