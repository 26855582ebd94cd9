"""Report how well a selection covers its source: lengths, labels, tokens, and numbers of dropped requests by reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from belle_compile.compiler.requests.selection import Selection, SelectOptions
from belle_compile.compiler.requests.strata import bucket, bucket_bounds
from belle_compile.compiler.requests.units import Units

_MISSING_SHOWN = 20


def coverage_report(selection: Selection, options: SelectOptions, units: Units) -> dict[str, Any]:
    """Return the content of coverage.json. Shares lie between 0 and 1; lengths are in `length.unit`.

    "read" counts all requests of the file, "kept" those that were not dropped, "calibration" and "holdout" those that were
    selected. For the two selected parts, `tokens` gives the share of the file's distinct tokens that occur in the part
    (`distinct_share`), and the share of all token occurrences in the file that are of such a token (`occurrence_share`).
    """
    groups = {
        "read": selection.read, "kept": selection.kept, "calibration": selection.calibrating, "holdout": selection.held_out,
    }  # fmt: skip
    return {
        "requests": {name: census.requests for name, census in groups.items()},
        "asked_for": {"calibration": options.size, "holdout": options.holdout},
        "dropped": selection.dropped,
        "redacted": selection.redacted,
        "shared_beginning": len(selection.shared_beginning),
        "strata": {"kept": selection.strata, "without_calibration_request": selection.strata_left_out},
        "length": {
            "unit": units.name,
            **{name: _lengths(census.lengths) for name, census in groups.items()},
            "histogram": _histogram({name: census.lengths for name, census in groups.items()}),
        },
        "labels": {name: _shares({group: census.labels.get(name, Counter()) for group, census in groups.items()})
                   for name in options.labels},
        "tokens": _tokens(selection, units),
    }  # fmt: skip


def _lengths(lengths: Mapping[int, int]) -> dict[str, Any]:
    """Minimum, mean, median and maximum length; for an even number of requests, the lower of the two middle lengths."""
    count = sum(lengths.values())
    if not count:
        return {"least": None, "mean": None, "median": None, "greatest": None}
    passed, median = 0, 0
    for length in sorted(lengths):
        passed += lengths[length]
        if 2 * passed >= count:
            median = length
            break
    mean = sum(length * times for length, times in lengths.items()) / count
    return {"least": min(lengths), "mean": round(mean, 2), "median": median, "greatest": max(lengths)}


def _histogram(groups: Mapping[str, Mapping[int, int]]) -> list[dict[str, int]]:
    """One row per power of two that occurs: its bounds, and the number of requests of each group."""
    counts = {group: Counter[int]() for group in groups}
    for group, lengths in groups.items():
        for length, times in lengths.items():
            counts[group][bucket(length)] += times
    numbers = {number for group in counts.values() for number in group}
    return [
        {"from": bucket_bounds(number)[0], "to": bucket_bounds(number)[1], **{name: counts[name][number] for name in groups}}
        for number in range(min(numbers), max(numbers) + 1)
    ]


def _shares(groups: Mapping[str, Mapping[str, int]]) -> list[dict[str, Any]]:
    """One row per value of a label, the most frequent first: the number and the share of requests in each group."""
    totals = {name: sum(values.values()) for name, values in groups.items()}
    rows = []
    for value in sorted(groups["read"], key=lambda value: (-groups["read"][value], value)):
        counts = {name: values.get(value, 0) for name, values in groups.items()}
        shares = {f"{name}_share": _share(counts[name], totals[name]) for name in groups}
        rows.append({"value": value, **counts, **shares})
    return rows


def _tokens(selection: Selection, units: Units) -> dict[str, Any]:
    read = selection.read.units
    occurrences = sum(read.values())
    missing = sorted(
        (unit for unit in read if unit not in selection.calibrating.units), key=lambda unit: (-read[unit], str(unit))
    )
    covered: dict[str, Any] = {}
    for name, census in (("calibration", selection.calibrating), ("holdout", selection.held_out)):
        covered[name] = {
            "distinct": len(census.units),
            "distinct_share": _share(len(census.units), len(read)),
            "occurrence_share": _share(sum(read[unit] for unit in census.units), occurrences),
        }
    return {
        "unit": units.name,
        "tokenizer": units.source,
        "distinct": len(read),
        "occurrences": occurrences,
        **covered,
        "most_frequent_missing": [
            {"token": units.spelled(unit), "occurrences": read[unit]} for unit in missing[:_MISSING_SHOWN]
        ],
    }


def _share(part: int, whole: int) -> float:
    return round(part / whole, 6) if whole else 0.0


def notes(report: Mapping[str, Any]) -> list[str]:
    """Sentences that qualify the numbers of the report."""
    requests, asked, sentences = report["requests"], report["asked_for"], []
    short = [f"{requests[name]} of {asked[name]} for {name}" for name in asked if requests[name] < asked[name]]
    if short:
        sentences.append(f"Fewer requests than asked for were left: {' and '.join(short)}.")
    if report["tokens"]["tokenizer"] is None:
        sentences.append("No tokenizer was given: lengths and coverage are in characters, and requests of token ids in those.")
    if report["shared_beginning"]:
        sentences.append(
            f"Most requests begin with the same {report['shared_beginning']} characters, which were left out when near "
            "duplicates were looked for."
        )
    without = report["strata"]["without_calibration_request"]
    if without:
        sentences.append(
            f"{without} of {report['strata']['kept']} strata (length by label) have no calibration request: take a larger size."
        )
    return sentences
