"""Convert the sections of a report to rows, bars and sentences, in the order of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from belle_compile.compiler.report import figures
from belle_compile.compiler.report.data import Arena, Damage, Drift, Effects, Memory, Report, Stage
from belle_compile.compiler.report.figures import Bar, number, percent, phrase, words
from belle_compile.compiler.tilings import tiling_rows
from belle_compile.compiler.units import size
from belle_compile.runtime.artifact import GenerationDefaults, Manifest, PassRecord
from belle_compile.runtime.schema import to_plain

View = dict[str, Any]

MOST_LAYERS = 40
_LEAST_KL = 1e-6  # a smaller divergence is rounding of float32
_FIRST_CALLS = 40  # the first calls of a longer step are drawn alone, too: two or three layers, which look like all others
_MOST_BARS = 60
_MOST_IN_A_ROW = 4  # up to this many numbers are one row of text; more are a plot
_PLOTTED = ("histogram", "shares", "dropped")  # titles with these endings are plots whatever the number of values


def summary(report: Report) -> list[tuple[str, str, str]]:
    """The figures at the top of the page, as (name, value, details)."""
    manifest, stages, accuracy = report.manifest, report.effects.stages, report.manifest.accuracy
    total = sum(record.bytes for record in report.files.values())
    weights = report.memory.need.weights if report.memory else 0
    calls, needs = manifest.kernel_calls, manifest.target.requires
    cards = [
        ("engine", size(total), f"{len(report.files)} files beside manifest and report"),
        ("weights", size(weights), f"{size(stages[0].weight_bytes)} in float32" if stages else "as packed for the kernels"),
        ("kernel calls a step", number(calls.after), f"{number(calls.before)} before fusion"),
        (
            "memory a host needs",
            size(needs.memory_bytes),
            (f"{size(needs.mapped_bytes)} of it for mapped weights; " if needs.mapped_bytes else "")
            + f"{needs.arch} with {' or '.join(needs.isa)}",
        ),
    ]
    if not weights:
        del cards[1]
    if accuracy and _real(accuracy.get("top1_agreement")):
        more = f"KL {number(accuracy['kl'])} nats a token" if _real(accuracy.get("kl")) else ""
        return [("same next token", percent(accuracy["top1_agreement"]), more), *cards]
    return [("accuracy", "not measured", report.uncalibrated or "built without --calibration"), *cards]


def verdict(manifest: Manifest) -> View | None:
    """Whether the engine kept all limits of the gate, and which it missed; None where no limit was applied."""
    measured = accuracy(manifest)
    judged = [row for row in measured["rows"] if row["passed"] is not None] if measured else []
    if not judged:
        return None
    missed = [f"{row['label']} {row['after']}, {row['limit']}" for row in judged if not row["passed"]]
    return {"passed": not missed, "missed": missed, "counts": measured["counts"] if measured else ""}


def built(report: Report) -> View:
    """Rows about the checkpoint, the target, the passes and the toolchain."""
    manifest = report.manifest
    model, target, template, special = manifest.model, manifest.target, manifest.prompt_template, manifest.special_tokens
    facts = [
        ("model", f"{model.name}: {model.family}, {model.parameters / 1e6:,.1f} M parameters"),
        ("dimensions", phrase({words(name): value for name, value in model.dimensions.items()})),
        ("target", f"{target.name}, kernels for {', '.join(target.isas)}"),
        ("quantization", "; ".join(f"{words(name)}: {phrase(value)}" for name, value in manifest.quantization.items())),
        ("prompt template", template.name),
        ("answers end with", f"token {' or '.join(map(str, special.eos))}" if special.eos else "no token of their own"),
        ("generation defaults", generation(manifest.generation)),
    ]
    return {
        "facts": facts,
        "passes": [_pass(record) for record in manifest.passes],
        "toolchain": sorted(manifest.toolchain.items()),
        "sources": sorted(model.source_digests.items()),
        "files": [(path, size(record.bytes), record.sha256) for path, record in sorted(report.files.items())],
    }


def generation(defaults: GenerationDefaults) -> str:
    """The generation defaults in words."""
    return phrase({words(name): value for name, value in to_plain(defaults).items()})


def _pass(record: PassRecord) -> View:
    options, notes = dict(record.options), list(record.refusals)
    if isinstance(entries := options.pop("entries", None), list):  # only tune-kernels has entries
        notes = [f"{name}: {line}" for name, line in tiling_rows(entries)] + notes
    if isinstance(errors := options.pop("relative_errors", None), dict):  # only quantize-again has these
        notes += _largest(errors)
    shown = {words(name): value for name, value in options.items() if value not in ([], {}, "")}
    return {"name": record.name, "changes": number(record.changes), "options": phrase(shown), "notes": notes}


def _largest(errors: Mapping[str, float]) -> list[str]:
    """Errors by name, the largest first, in words."""
    ranked = sorted(errors.items(), key=lambda item: (-item[1], item[0]))
    more = [f"and {len(ranked) - MOST_LAYERS} more"] if len(ranked) > MOST_LAYERS else []
    return [f"{name}: {number(error)}" for name, error in ranked[:MOST_LAYERS]] + more


def effects(measured: Effects) -> View | None:
    """One row per stage, and a plot of each number over the passes that changed something."""
    if not measured.stages:
        return None
    changed = [stage for stage in measured.stages if stage.changes != 0]
    plots: list[tuple[str, list[tuple[str, float, str]]]] = [
        ("weights read", [(stage.name, stage.weight_bytes, size(stage.weight_bytes)) for stage in changed]),
        ("kernel calls a step", [(stage.name, stage.kernel_calls, _calls(stage)) for stage in changed]),
    ]
    if measured.tokens:
        drifts = [(stage.name, stage.drift) for stage in changed if stage.drift]
        plots.insert(0, ("drift: KL, nats a token", [(name, drift.kl, _kl(drift)) for name, drift in drifts]))
    return {
        "rows": [_stage(stage) for stage in measured.stages],
        "plots": [(title, figures.bars(rows)) for title, rows in plots],
        "tokens": measured.tokens,
        "unmeasured": measured.unmeasured,
        "unlowered": any(not stage.lowers for stage in measured.stages),
        "parts": any(not stage.whole for stage in measured.stages),
    }


def _stage(stage: Stage) -> View:
    drift = stage.drift
    cells = [
        "" if stage.changes is None else number(stage.changes),
        size(stage.weight_bytes),
        _calls(stage),
        *(("–", "–", "–") if drift is None else (_kl(drift), percent(drift.top1), number(drift.max_difference, 2))),
    ]
    return {"name": stage.name, "idle": stage.changes == 0, "cells": cells}


def _calls(stage: Stage) -> str:
    return number(stage.kernel_calls) if stage.lowers else f"({number(stage.kernel_calls)})"


def _kl(drift: Drift) -> str:
    return number(drift.kl) if drift.kl >= _LEAST_KL else "0" if drift.kl == 0 else f"< {number(_LEAST_KL, 1)}"


def accuracy(manifest: Manifest) -> View | None:
    """The engine's accuracy beside the unquantized model, with the limits of the build."""
    if not manifest.accuracy:
        return None
    rest = dict(manifest.accuracy)
    limits = dict(rest.pop("limits", None) or {})
    ratio, kept, answered = (rest.get(key) for key in ("perplexity_ratio", "accuracy_kept", "answer_accuracy"))
    perplexity = rest.get("perplexity")
    before = {
        "perplexity": number(perplexity / ratio, 5) if _real(perplexity) and _real(ratio) and ratio else "",
        "answer_accuracy": percent(answered / kept) if _real(answered) and _real(kept) and kept else "",
        "perplexity_ratio": "1",
        "top1_agreement": percent(1),
        "accuracy_kept": percent(1),
        "greedy_prefix": percent(1),
        "kl": "0",
    }
    rows = []
    for key, label, text in _MEASURES:
        value, limit = rest.pop(key, None), _LIMITS.get(key)
        bound = limits.pop(limit[0], None) if limit else None
        if value is None and bound is None:
            continue
        row = {"label": label, "before": before[key], "after": text(value) if _real(value) else phrase(value)}
        rows.append(row | _verdict(value, bound, limit, text))
    counts = [f"{phrase(rest.pop(key))} {key}" for key in ("requests", "tokens", "answers") if key in rest]
    others = {words(key): value for key, value in (rest | limits).items() if value is not None}
    return {"rows": rows, "counts": ", ".join(counts), "others": [(name, phrase(value)) for name, value in others.items()]}


def _short(value: float) -> str:
    return number(value, 4)


_MEASURES = (
    ("perplexity", "perplexity", lambda value: number(value, 5)),
    ("perplexity_ratio", "perplexity, engine to model", lambda value: number(value, 5)),
    ("top1_agreement", "same next token (top-1)", percent),
    ("kl", "KL divergence, nats a token", _short),
    ("greedy_prefix", "greedy answer, part until it differs", percent),
    ("answer_accuracy", "tokens of expected answers predicted", percent),
    ("accuracy_kept", "of that accuracy kept", percent),
)
_LIMITS = {  # measure -> name of its limit, and whether it is the most or the least allowed
    "perplexity_ratio": ("max_perplexity_ratio", True),
    "top1_agreement": ("min_top1", False),
    "accuracy_kept": ("min_accuracy_kept", False),
}


def _verdict(value: Any, bound: Any, limit: tuple[str, bool] | None, text: Any) -> View:
    if limit is None or not _real(bound):
        return {"limit": "", "passed": None}
    at_most = limit[1]
    passed = None if not _real(value) else bool(value <= bound if at_most else value >= bound)
    return {"limit": f"at {'most' if at_most else 'least'} {text(float(bound))}", "passed": passed}


def layers(ranking: Sequence[Damage]) -> View | None:
    """The linear layers that INT8 damages most, and a plot of the damage over the depth of the model."""
    if not ranking:
        return None
    by_kl = all(layer.kl is not None for layer in ranking)

    def damage(layer: Damage) -> float:
        return float(layer.kl or 0.0) if by_kl else layer.output_error

    worst = sorted(ranking, key=lambda layer: (-damage(layer), layer.name))
    worst_of: dict[int, Damage] = {}  # by index of the layer
    for layer in worst:
        index = next((int(word) for word in layer.name.split(".") if word.isdecimal()), None)
        if index is not None:
            worst_of.setdefault(index, layer)
    about = "the greatest damage in each layer, first to last"
    names = [(f"{worst_of[i].name}: {number(damage(worst_of[i]))}", damage(worst_of[i])) for i in sorted(worst_of)]
    ends = (f"layer {min(worst_of)}", f"layer {max(worst_of)}") if worst_of else ("", "")
    shown = [(layer.name, damage(layer), number(damage(layer))) for layer in worst[:MOST_LAYERS]]
    return {
        "by_kl": by_kl,
        "total": len(ranking),
        "bars": figures.bars(shown),
        "profile": figures.columns(names, ends, about) if len(names) > 1 else None,
    }


def memory(largest: Memory | None, kv_cache: str, ranks: Sequence[Memory] = ()) -> View | None:
    """Rows about the memory that a host needs, and a drawing of how activations share the arena."""
    if largest is None:
        return None
    need, kv, arena = largest.need, largest.kv, largest.arena
    activations = "activations" if arena is None else "activations (arena)"
    parts = [("weights", need.weights), (activations, need.activations),
             (f"KV cache for {number(largest.kv_tokens)} tokens", need.kv_cache),
             ("kernels, program, tokenizer, process", need.reserve)]  # fmt: skip
    return {
        "required": size(need.total),
        "mapped": size(need.mapped) if need.mapped else "",
        "resident": size(need.resident),
        "ranks": [
            [size(count) for count in (part.weights, part.activations, part.kv_cache, part.reserve, part.total)]
            for part in (rank.need for rank in ranks)
        ],
        "parts": _sized(parts),
        "weights": _sized(list(largest.weights.items())),
        "kv_cache": kv_cache,
        "kv_token": size(round(largest.kv_token)),
        "kv_block": size(kv.block_bytes),
        "kv_block_tokens": kv.block_tokens,
        "kv_whole": size(kv.bytes(kv.max_context)),
        "max_context": number(kv.max_context),
        "activations": size(need.activations),
        "arena": None if arena is None else _arena(arena),
    }


def _arena(arena: Arena) -> View:
    """Drawings of a step's buffers in the arena: all calls, and of a long step also the first calls alone."""
    drawings = [figures.lifetimes(arena.buffers, arena.bytes, arena.calls, f"all {number(arena.calls)} calls of a step")]
    if arena.calls > _FIRST_CALLS:
        about = f"the first {_FIRST_CALLS} calls of a step"
        drawings.insert(0, figures.lifetimes(arena.buffers, arena.bytes, _FIRST_CALLS, about))
    return {
        "size": size(arena.bytes),
        "buffers": number(len(arena.buffers)),
        "unshared": size(sum(buffer.bytes for buffer in arena.buffers)),
        "drawings": drawings,
    }


def coverage(statistics: Mapping[str, Any] | None) -> View | None:
    """Every entry of the coverage: numbers and texts as rows, long series of numbers as bars, other lists as tables."""
    if not statistics:
        return None
    view: View = {"rows": [], "plots": [], "tables": []}
    for key, value in statistics.items():
        _cover(words(str(key)), value, view)
    return view


def _cover(title: str, value: Any, view: View) -> None:
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        _cover_rows(title, value, view)
        return
    if isinstance(value, list) and value and all(_is_pair(item) for item in value):
        value = {phrase(name): count for name, count in value}
    if not isinstance(value, Mapping):
        text = percent(value) if isinstance(value, float) and 0 <= value <= 1 else phrase(value)
        view["rows"].append((title, text or "none"))
    elif value and all(_real(count) for count in value.values()):
        shares = all(isinstance(count, float) and 0 <= count <= 1 for count in value.values())
        text_of = percent if shares else number
        if len(value) > _MOST_IN_A_ROW or title.endswith(_PLOTTED):
            _plot(title, [(str(name), float(count), text_of(count)) for name, count in value.items()], view)
        else:
            view["rows"].append((title, ", ".join(f"{words(str(name))} {text_of(count)}" for name, count in value.items())))
    elif value:
        for name, inner in value.items():
            _cover(f"{title}: {words(str(name))}", inner, view)
    else:
        view["rows"].append((title, "none"))


def _cover_rows(title: str, rows: Sequence[Mapping[str, Any]], view: View) -> None:
    """Add a list of mappings: ranges and values of a label as bars, which compare calibration requests with all requests;
    anything else as a table."""
    labels = [f"{row['from']} to {row['to']}" if row.keys() >= {"from", "to"} else row.get("value") for row in rows]
    key = next((key for key in ("calibration_share", "calibration") if all(_real(row.get(key)) for row in rows)), "")
    if not key or None in labels:
        heads = list(dict.fromkeys(str(name) for row in rows for name in row))
        view["tables"].append((title, heads, [[phrase(row.get(name, "")) for name in heads] for row in rows]))
        return
    text, all_key = (percent if key.endswith("_share") else number), key.replace("calibration", "read")
    bars = []
    for label, row in zip(labels, rows, strict=True):
        of_all = f", of all {text(row[all_key])}" if _real(row.get(all_key)) else ""
        bars.append((str(label), float(row[key]), f"{text(row[key])}{of_all}"))
    _plot(title, bars, view)


def _plot(title: str, rows: Sequence[tuple[str, float, str]], view: View) -> None:
    more = f", {_MOST_BARS} of {number(len(rows))}" if len(rows) > _MOST_BARS else ""
    view["plots"].append((title + more, figures.bars(rows[:_MOST_BARS])))


def _is_pair(item: Any) -> bool:
    return isinstance(item, (list, tuple)) and len(item) == 2 and not _real(item[0]) and _real(item[1])


def _real(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _sized(parts: Sequence[tuple[str, int]]) -> list[Bar]:
    return figures.bars((name, count, size(count)) for name, count in parts)
