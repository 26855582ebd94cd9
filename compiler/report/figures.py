"""Format numbers for people, and lay out the rectangles of plots, which the template draws."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from belle_compile.compiler.backends.program.memory_plan import PlannedBuffer
from belle_compile.compiler.units import size


@dataclass(frozen=True)
class Bar:
    """A horizontal bar of `width` percent with a label and the value as text."""

    label: str
    value: str
    width: float


@dataclass(frozen=True)
class Rect:
    """A rectangle in the units of its drawing; `title` is its tooltip."""

    x: float
    y: float
    width: float
    height: float
    title: str


@dataclass(frozen=True)
class Drawing:
    """Rectangles on `width` x 100 units, stretched to the page; `ends` are the labels below the left and the right end, and
    `about` is the caption."""

    width: float
    rects: tuple[Rect, ...]
    ends: tuple[str, str]
    about: str


def number(value: float, digits: int = 3) -> str:
    """Format a number with `digits` significant digits, as "1,234", "0.0127" or "3.1e-6"; integers in full."""
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < 1e-3:
        return f"{value:.{digits - 1}e}".replace("e-0", "e-")
    return f"{value:.{digits}g}"


def percent(share: float) -> str:
    """Format a share: 0.958 becomes "95.8 %"."""
    return f"{100 * share:.1f} %"


def phrase(value: Any) -> str:
    """Put a JSON value into words."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {phrase(item)}" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(phrase, value))
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return number(value) if isinstance(value, (int, float)) else str(value)


def words(name: str) -> str:
    """Put the name of a field into words."""
    return name.replace("_", " ")


def bars(rows: Iterable[tuple[str, float, str]]) -> list[Bar]:
    """One bar per (label, value, value as text); the bar of the greatest value is as wide as the page."""
    entries = list(rows)
    greatest = max((value for _, value, _ in entries if math.isfinite(value)), default=0) or 1
    return [Bar(label, text, _round(100 * max(min(value / greatest, 1), 0))) for label, value, text in entries]


def columns(values: Sequence[tuple[str, float]], ends: tuple[str, str], about: str) -> Drawing:
    """Named columns side by side; the column of the greatest value is as high as the drawing."""
    greatest = max((value for _, value in values), default=0) or 1
    heights = [100 * value / greatest for _, value in values]
    rects = tuple(
        Rect(i + 0.1, _round(100 - height), 0.8, _round(height), name)
        for i, ((name, _), height) in enumerate(zip(values, heights, strict=True))
    )
    return Drawing(len(values), rects, ends, about)


def lifetimes(buffers: Sequence[PlannedBuffer], arena: int, calls: int, about: str) -> Drawing:
    """The lifetimes of buffers over the first `calls` calls, which run from left to right; offsets in the arena run from top to
    bottom."""
    shown = [buffer for buffer in buffers if buffer.first < calls]
    rects = tuple(
        Rect(
            buffer.first, _round(100 * buffer.offset / arena), min(buffer.last + 1, calls) - buffer.first,
            _round(100 * buffer.bytes / arena), f"{buffer.node}: {size(buffer.bytes)}, calls {buffer.first} to {buffer.last}",
        )
        for buffer in shown
    )  # fmt: skip
    return Drawing(calls, rects, ("call 0", f"call {calls - 1}"), about)


def _round(value: float) -> float:
    return round(value, 2)
