"""Render coverage.html: the coverage report as one page with plots, which loads no other file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from belle_compile.compiler.requests.coverage import notes

_SHOWN = 30  # values of a label that are shown
_SERIES = (("read", "all requests"), ("calibration", "calibration"), ("holdout", "held out"))


def coverage_page(report: Mapping[str, Any], description: Mapping[str, Any]) -> str:
    """Render the result of `coverage_report` for the set that `description` (set.json) describes."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters["count"] = lambda value: f"{value:,}"
    environment.filters["percent"] = lambda value: f"{100 * value:.1f}%"
    template = environment.from_string((Path(__file__).parent / "coverage.html.jinja").read_text(encoding="utf-8"))
    return template.render(
        report=report, set=description, notes=notes(report), series=_SERIES, shown=_SHOWN,
        lengths=_length_bars(report), labels={name: _label_bars(rows[:_SHOWN]) for name, rows in report["labels"].items()},
    )  # fmt: skip


def _length_bars(report: Mapping[str, Any]) -> list[tuple[str, list[float]]]:
    """For each bucket of lengths, its name and the share of requests of each series."""
    totals = report["requests"]
    return [
        (
            f"{row['from']}" if row["from"] == row["to"] else f"{row['from']} to {row['to']}",
            [row[name] / totals[name] if totals[name] else 0.0 for name, _ in _SERIES],
        )
        for row in report["length"]["histogram"]
    ]


def _label_bars(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[float]]]:
    return [(row["value"], [row[f"{name}_share"] for name, _ in _SERIES]) for row in rows]
