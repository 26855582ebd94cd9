"""Statistics of the calibration requests, counted from their tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_BOUNDS = (16, 32, 64, 128, 256, 512, 1024, 2048)

Sequences = Sequence[Sequence[int]]


def coverage_of(calibration: Sequences, holdout: Sequences, vocabulary: int) -> dict[str, Any]:
    """Requests and tokens of both parts, lengths of requests in tokens, and the share of the vocabulary that occurs in the
    calibration part."""
    lengths = [len(sequence) for sequence in (*calibration, *holdout)]
    seen = {token for sequence in calibration for token in sequence}
    return {
        "requests": {"to calibrate with": len(calibration), "held out": len(holdout)},
        "tokens": {"to calibrate with": sum(map(len, calibration)), "held out": sum(map(len, holdout))},
        "longest_request_tokens": max(lengths, default=0),
        "length_histogram": _histogram(lengths),
        "different_tokens": len(seen),
        "token_coverage": len(seen) / vocabulary,
    }


def coverage_of_set(path: Path) -> dict[str, Any]:
    """The description of a calibration set's directory under "set"; empty for a file, or if it cannot be read."""
    try:
        description = json.loads((path / "coverage.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {"set": description}


def _histogram(lengths: Sequence[int]) -> dict[str, int]:
    """The number of lengths in each range, from the range of the shortest length to that of the longest."""
    ranges = [(low + 1, high) for low, high in zip((0, *_BOUNDS), _BOUNDS, strict=False)]
    counts = [(f"{low} to {high}", sum(low <= length <= high for length in lengths)) for low, high in ranges]
    counts.append((f"over {_BOUNDS[-1]}", sum(length > _BOUNDS[-1] for length in lengths)))
    filled = [i for i, (_, count) in enumerate(counts) if count]
    return dict(counts[filled[0] : filled[-1] + 1]) if filled else {}
