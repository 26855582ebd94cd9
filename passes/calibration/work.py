"""Intermediate results of a pass that takes long, so that a build that was killed continues from there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx_ir as ir

from belle_compile.compiler.ir.segments import Segment, cut
from belle_compile.compiler.ir.stream import ActivationStream
from belle_compile.passes.calibration.data import CalibrationData
from belle_compile.passes.calibration.state import STATE_NAME


class Work:
    """A folder with the results of one key; those of another key are removed. The first `done` segments need not run again."""

    def __init__(self, folder: Path, key: str) -> None:
        self._state, self._folder, self._key = folder / STATE_NAME, folder, key
        try:
            state = json.loads(self._state.read_text(encoding="utf-8"))
            self.done = int(state["done"]) if state["key"] == key else 0
        except (OSError, ValueError, KeyError, TypeError):
            self.done = 0
        if not self.done:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)

    def file(self, name: str, suffix: str = ".safetensors") -> Path:
        """The path of a result."""
        return self._folder / f"{name}{suffix}"

    def finish(self, number: int) -> None:
        """Record that segments up to this one are done."""
        fresh = self._state.with_suffix(".new")
        fresh.write_text(json.dumps({"key": self._key, "done": number + 1}), encoding="utf-8")
        fresh.replace(self._state)


def walk(
    data: CalibrationData, model: ir.Model, name: str, key: str, segments_of: Callable[[ir.Graph], list[Segment]] = cut
) -> tuple[Work, Callable[[], Iterator[tuple[ActivationStream, int]]]]:
    """The work of the pass `name`, and a function that iterates over (stream, number) of each segment that is not done yet.
    `segments_of` cuts the graph.

    A segment is recorded as done, and the activations before it are removed, when the iteration goes on to the next one.
    """
    folder = data.folder / name
    work = Work(folder, key)

    def segments() -> Iterator[tuple[ActivationStream, int]]:
        stream = ActivationStream(model, data.sequences, folder, segments=segments_of(model.graph))
        total = len(stream.segments) * stream.tokens
        for number in range(work.done, len(stream.segments)):
            data.on_progress(number * stream.tokens, total)
            yield stream, number
            work.finish(number)
            stream.drop(number)
        data.on_progress(total, total)

    return work, segments
