"""Real text that every Python has: its own language documentation, in windows for calibration and for judging."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Callable

WINDOW = 512
HELD_OUT_EVERY = 4  # of four windows, one is held out


def documentation() -> str:
    """All topics in alphabetical order."""
    return "\n\n".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics))


def windows(encode: Callable[[str], list[int]], calibration: int, held_out: int) -> tuple[list[list[int]], list[list[int]]]:
    """(windows to calibrate with, windows held out) of 512 tokens, spread over the text; no token is in both."""
    every = cut(encode(documentation()))
    kept = [window for i, window in enumerate(every) if i % HELD_OUT_EVERY == 0]
    rest = [window for i, window in enumerate(every) if i % HELD_OUT_EVERY]
    return _spread(rest, calibration), _spread(kept, held_out)


def cut(ids: list[int]) -> list[list[int]]:
    """Its whole windows, one after the other."""
    return [ids[i : i + WINDOW] for i in range(0, len(ids) - WINDOW + 1, WINDOW)]


def _spread(windows: list[list[int]], count: int) -> list[list[int]]:
    assert len(windows) >= count, f"the text has {len(windows)} windows, {count} are wanted"
    return [windows[i * len(windows) // max(count, 1)] for i in range(count)]
