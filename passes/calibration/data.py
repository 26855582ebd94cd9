"""The input of passes that calibrate: tokens of calibration requests, and a folder for intermediate results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from belle_compile.compiler.ir.text import to_text


def _quiet(done: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class CalibrationData:
    """The token `sequences` of a calibration set, the `digest` of the set, and that of the `checkpoint` they run through.

    Passes store the results of finished segments in `folder`, so that a build that was killed continues from there.
    `on_progress(done, total)` is called with numbers of tokens, each counted once for every segment that it runs through.
    """

    sequences: tuple[tuple[int, ...], ...]
    digest: str
    checkpoint: str
    folder: Path
    on_progress: Callable[[int, int], None] = _quiet

    @classmethod
    def of_files(
        cls,
        sequences: tuple[tuple[int, ...], ...],
        digest: str,
        files: Mapping[str, str],
        reading: Mapping[str, Any],
        folder: Path,
        on_progress: Callable[[int, int], None],
    ) -> CalibrationData:
        """The data for a checkpoint of `files`, whose digests are given by their names, and facts on how they are read, such as
        the scales of adapters: by these, a build that continues recognizes the results of the one that was killed."""
        checkpoint = hashlib.sha256(json.dumps([dict(sorted(files.items())), dict(reading)]).encode()).hexdigest()
        return cls(sequences, digest, checkpoint, folder, on_progress)

    @property
    def tokens(self) -> int:
        """The number of tokens of all sequences."""
        return sum(map(len, self.sequences))

    def describe(self) -> dict[str, Any]:
        """The entries on the data in the manifest's records of passes."""
        return {"calibration": self.digest, "sequences": len(self.sequences), "tokens": self.tokens}

    def key(self, model: ir.Model, options: dict[str, Any]) -> str:
        """A digest of all that results depend on: the graph, its weights, the tokens, and the options of the pass."""
        parts = [to_text(model), self.digest, self.checkpoint, json.dumps(options, sort_keys=True)]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()
