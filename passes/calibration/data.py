"""What passes get that look at activations: the tokens of calibration requests, and a folder for what they find."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from belle_compile.compiler.ir.text import to_text


def _quiet(done: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class CalibrationData:
    """Token sequences with the digest of the set they come from, and of the checkpoint they are run through.

    Passes keep results in `folder` while they work: killed, they go on from there. `on_progress(done, total)` hears of tokens,
    counted once for every segment they have gone through.
    """

    sequences: tuple[tuple[int, ...], ...]
    digest: str
    checkpoint: str
    folder: Path
    on_progress: Callable[[int, int], None] = _quiet

    @property
    def tokens(self) -> int:
        """Of all sequences."""
        return sum(map(len, self.sequences))

    def describe(self) -> dict[str, Any]:
        """For the manifest."""
        return {"calibration": self.digest, "sequences": len(self.sequences), "tokens": self.tokens}

    def key(self, model: ir.Model, options: dict[str, Any]) -> str:
        """What results depend on: the graph, its weights, the tokens, a pass's options."""
        parts = [to_text(model), self.digest, self.checkpoint, json.dumps(options, sort_keys=True)]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()
