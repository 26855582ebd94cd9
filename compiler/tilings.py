"""The tilings that `build --tune` measured, in words: for `inspect`, the report and the tuning command."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_UNBOUNDED = 1 << 30  # the number of rows up to which the walk called "any" is used
_NEVER = 1 << 20  # the least number of rows for tile products, in a table without tile products


def tiling_rows(entries: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Describe the entries of a tiling table as the manifest holds them.

    There is one line for each range of row counts of each shape, with the time at each row count that was measured and how
    much it differs from the built-in choice: ("tuned 2048x5632, up to 4 rows", "4x6 prefetch 2048: 2 rows 310 us (-4%), ...").
    """
    return [row for entry in entries for row in (*_walk_rows(entry), *_tile_rows(entry))]


def _walk_rows(entry: dict[str, Any]) -> list[tuple[str, str]]:
    """A line for each range of row counts for which kernels walk over the weights."""
    rows, least = [], 1
    bounds = sorted(entry["walks"], key=lambda bound: _UNBOUNDED if bound == "any" else int(bound))
    for bound in bounds:
        most = _UNBOUNDED if bound == "any" else int(bound)
        times = [(int(count), *pair) for count, pair in entry["microseconds"].items() if least <= int(count) <= most]
        measured = ", ".join(
            f"{count} {'row' if count == 1 else 'rows'} {tuned:g} us ({(tuned / built_in - 1) * 100:+.0f}%)"
            for count, tuned, built_in in sorted(times)
        )
        walk = ": ".join(filter(None, (_walk_phrase(entry["walks"][bound]), measured)))
        rows.append((f"tuned {_shape(entry)}, {_range_phrase(least, bound)}", walk))
        least = most + 1
    return rows


def _tile_rows(entry: dict[str, Any]) -> list[tuple[str, str]]:
    """A line for the row counts from which kernels multiply tiles, if the instruction set has such instructions."""
    tiles_from = entry.get("tiles_from", _NEVER)
    if tiles_from >= _NEVER:
        return []
    wide, panels = entry.get("tile_wide", 3), entry.get("tile_panels", 6)
    name = f"tuned {_shape(entry)}, {tiles_from} rows or more"
    return [(name, f"tile products, {panels} panels a task, {wide} at a time")]


def _shape(entry: dict[str, Any]) -> str:
    return f"{entry['outputs']}x{entry['inputs']}"


def _range_phrase(least: int, bound: str) -> str:
    return f"{least} rows or more" if bound == "any" else "1 row" if bound == "1" else f"up to {bound} rows"


def _walk_phrase(walk: dict[str, Any]) -> str:
    rest = [f"{name} {value}" for name, value in walk.items() if name not in ("wide", "tall")]
    return ", ".join([f"{walk['wide']}x{walk['tall']}", *rest])
