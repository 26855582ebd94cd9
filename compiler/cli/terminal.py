"""The output of commands: JSON or aligned text on stdout, and progress bars on stderr if that is a terminal."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import click

from belle_compile.compiler.tables import table
from belle_compile.compiler.units import size


class Progress(Protocol):
    """Callback for the progress of a stage: `done` of `total` units; a total of 0 is a stage of unknown length."""

    def __call__(self, stage: str, done: int = 0, total: int = 0) -> None: ...


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """Draw one bar for each stage; draw nothing where stderr is no terminal or rich is not installed."""
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            Progress,
            SpinnerColumn,
            TaskID,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
    except ModuleNotFoundError:
        yield lambda stage, done=0, total=0: None
        return
    if not sys.stderr.isatty():
        yield lambda stage, done=0, total=0: None
        return
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}

        def draw(stage: str, done: int = 0, total: int = 0) -> None:
            if stage not in tasks:
                for task in tasks.values():  # a new stage begins when the previous one has ended
                    length = bars.tasks[task].total or 1
                    bars.update(task, total=length, completed=length)
                tasks[stage] = bars.add_task(stage, total=None)
            bars.update(tasks[stage], completed=done, total=total or None)

        yield draw


class Stopwatch:
    """Measures the time since it was made, and the peak memory of this process."""

    def __init__(self) -> None:
        self._started = time.perf_counter()

    def read(self) -> tuple[dict[str, float], str]:
        """Seconds and peak memory, for JSON and in words."""
        seconds = time.perf_counter() - self._started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        plain = {"seconds": round(seconds, 3), "peak_memory_bytes": peak}
        return plain, f"{seconds:.1f} s, with at most {size(peak)} of memory"


def show(result: dict[str, Any], rows: Sequence[tuple[str, str]], as_json: bool) -> None:
    """Print a command's result: the object as JSON, or its rows as a table."""
    click.echo(json.dumps(result, indent=2, sort_keys=True, ensure_ascii=False) if as_json else table(rows))
