"""What the harness finds of a model on the tasks of this repository, and how two models agree."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from benchmarks.lm_eval import TASKS


def evaluate(
    model: Any, tasks: Sequence[str], limit: int | None, cache: Path | None = None, gen_kwargs: dict[str, Any] | None = None
) -> Any:
    """The harness' results of a model on the tasks of this repository; `gen_kwargs` are added to those of the tasks."""
    if cache:
        cache.parent.mkdir(parents=True, exist_ok=True)
    return simple_evaluate(
        model=model, tasks=list(tasks), task_manager=TaskManager(include_path=TASKS, include_defaults=False), limit=limit,
        use_cache=str(cache) if cache else None, bootstrap_iters=0, gen_kwargs=gen_kwargs,
    )  # fmt: skip


def metrics(results: Any) -> dict[str, dict[str, float]]:
    """Task -> metric -> value."""
    return {
        task: {
            key.split(",")[0]: round(value, 5)
            for key, value in sorted(found.items())
            if "," in key and "_stderr" not in key and isinstance(value, float)
        }
        for task, found in sorted(results["results"].items())
    }


def agreement(expected: Sequence[Any], found: Sequence[Any]) -> dict[str, float]:
    """How two models' samples of one task agree: share of equal decisions, and by how much log probabilities differ.

    A decision is the likeliest choice, whether the one continuation is the likeliest, or the text written. A likelihood's
    difference is relative where it is of a whole text.
    """
    same, differences = [], []
    for one, other in zip(expected, found, strict=True):
        assert one["doc_id"] == other["doc_id"]
        ours, theirs = other["filtered_resps"], one["filtered_resps"]
        if isinstance(one["resps"][0][0], str):
            same.append(one["resps"] == other["resps"])
        elif isinstance(theirs[0], float):
            differences.append(abs(ours[0] / theirs[0] - 1))
        else:
            differences += [abs(a[0] - b[0]) for a, b in zip(ours, theirs, strict=True)]
            same.append(_decision(ours) == _decision(theirs))
    result: dict[str, float] = {}
    if same:
        result["same_decision"] = round(sum(same) / len(same), 4)
    if differences:
        result["mean_difference"] = float(f"{sum(differences) / len(differences):.3g}")
        result["max_difference"] = float(f"{max(differences):.3g}")
    return result


def _decision(responses: Sequence[Any]) -> int:
    if len(responses) == 1:
        return int(responses[0][1])
    return max(range(len(responses)), key=lambda index: float(responses[index][0]))
