"""The progress of a command on stderr and in a log file, and the seconds and peak memory of its stages.

On a terminal each stage has a bar. Elsewhere it has a line when it ends; a stage that takes long has a line after ten seconds
and one a minute. Ctrl-C is acknowledged by a thread of its own at once, even while native code keeps Python from stopping.
"""

from __future__ import annotations

import contextlib
import resource
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

import click

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.units import duration, size
from belle_compile.runtime.usage import Output

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import Task

QUIET, NORMAL, VERBOSE = range(3)
FIRST_LINE_S, LINE_S = 10.0, 60.0  # a stage has a line after this time, and one in every such time
LONG_S = 60.0  # the time left is shown for stages that take this long
_END = b"\0"  # no signal has this number
_ESTIMATED_S = 3.0  # no estimate before the stage has run for this time


@dataclass
class Stage:
    """A stage of a command: when it started (time.perf_counter), how far it is, and once it has ended its seconds and its peak
    memory in bytes.

    The estimate of the time left is that of the stage's whole run, from `since`, when the first `before` units were already
    done: calibration that continues begins in the middle.
    """

    name: str
    started: float
    done: int = 0
    total: int = 0
    since: float = 0.0
    before: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int = 0

    def advance(self, done: int, total: int, now: float) -> None:
        """Note the progress; a stage whose count starts again is estimated from there."""
        if done < self.done or total != self.total:
            self.since, self.before = now, done
        self.done, self.total = done, total

    def left_s(self, now: float) -> float | None:
        """The seconds left, or None where nothing can be said yet or the stage is too short for it."""
        spent, advanced = now - self.since, self.done - self.before
        if not self.total or advanced <= 0 or spent < _ESTIMATED_S:
            return None
        left = spent * (self.total - self.done) / advanced
        return left if now - self.started + left >= LONG_S else None

    def words(self, now: float) -> str:
        """The progress in words: "calibrate: 12 of 96, 75 s, about 9 min left"."""
        count = f"{self.done:,} of {self.total:,}, " if self.total else ""
        left = self.left_s(now)
        return f"{self.name}: {count}{now - self.started:.1f} s" + ("" if left is None else f", about {duration(left)} left")

    def to_plain(self) -> dict[str, Any]:
        return {"stage": self.name, "seconds": round(self.seconds, 3), "peak_memory_bytes": self.peak_memory_bytes}


@dataclass
class Run(Output):
    """What a command shows besides its result, and what it did: the options of `options.reporting`, and the stages so far.

    Made once for a command line, before it is parsed.
    """

    verbosity: int = NORMAL
    log: Path | None = None
    stages: list[Stage] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)
    on_interrupt: Callable[[], str] = lambda: ""  # says what an interrupted command keeps, and how to go on

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    @property
    def peak_memory_bytes(self) -> int:
        return max([_peak_of_process(), *(stage.peak_memory_bytes for stage in self.stages)])

    def to_plain(self) -> dict[str, Any]:
        """Seconds, peak memory, and those of each stage, as commands print them with --json."""
        stages = [stage.to_plain() for stage in self.stages]
        return {"seconds": round(self.seconds, 3), "peak_memory_bytes": self.peak_memory_bytes, "stages": stages}

    def words(self) -> str:
        return f"{self.seconds:.1f} s, with at most {size(self.peak_memory_bytes)} of memory"

    @contextlib.contextmanager
    def following(self) -> Iterator[Reporter]:
        """Follow the stages of a command; yields the callback that it reports to."""
        with _log_file(self.log) as log, _bars(self.verbosity) as bars, Reporter(self, log, bars) as reporter:
            yield reporter


class Reporter:
    """Callback for the progress of stages: `done` of `total` units; a total of 0 is a stage of unknown length. A stage ends
    when another begins, or with the block."""

    def __init__(self, run: Run, log: TextIO | None = None, bars: Bars | None = None) -> None:
        self._run, self._log, self._bars = run, log, bars
        self._lock = threading.RLock()
        self._task: Any = None
        self._next_line = 0.0
        self._signals, self._wake = socket.socketpair()
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)
        self._previous_fd: int | None = None

    @property
    def current(self) -> Stage | None:
        """The stage that has not ended yet."""
        stage = self._run.stages[-1] if self._run.stages else None
        return None if stage is None or stage.seconds else stage

    def __call__(self, name: str, done: int = 0, total: int = 0) -> None:
        now = time.perf_counter()
        with self._lock:
            stage = self.current
            if stage is None or stage.name != name:
                self._end(now)
                stage = self._begin(name, now)
            stage.advance(done, total, now)
            if self._bars is not None:
                self._bars.update(self._task, completed=done, total=total or None)

    def say(self, line: str) -> None:
        """Print a line on stderr, above the bars, unless the command is to be quiet; it goes to the log too."""
        self._write(line, self._run.verbosity > QUIET)

    def __enter__(self) -> Reporter:
        self._wake.setblocking(False)
        if threading.current_thread() is threading.main_thread():
            self._previous_fd = signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._previous_fd is not None:
            signal.set_wakeup_fd(self._previous_fd)
        self._wake.send(_END)
        self._thread.join()
        self._wake.close()
        self._signals.close()
        with self._lock:
            self._end(time.perf_counter(), finished=kind is None)

    def _begin(self, name: str, now: float) -> Stage:
        _reset_peak()
        stage = Stage(name, now, since=now)
        self._run.stages.append(stage)
        self._next_line = now + FIRST_LINE_S
        self._to_log(f"{name}: started")
        if self._bars is not None:
            self._task = self._bars.add_task(name, total=None, stage=stage)
        return stage

    def _end(self, now: float, *, finished: bool = True) -> None:
        """End the stage that runs. A terminal keeps its bar; elsewhere it gets its line, unless it failed in silence."""
        stage = self.current
        if stage is None:
            return
        stage.seconds = max(now - stage.started, 1e-6)
        stage.peak_memory_bytes = _peak_memory()
        if self._bars is not None:
            length = stage.total or 1
            self._bars.update(self._task, total=length, completed=length if finished else stage.done)
            self._bars.stop_task(self._task)
        memory = f", with at most {size(stage.peak_memory_bytes)} of memory" if self._run.verbosity >= VERBOSE else ""
        line = f"{stage.name}: {'' if finished else 'not finished after '}{stage.seconds:.1f} s{memory}"
        self._write(line, self._run.verbosity > QUIET and self._bars is None and finished)

    def _watch(self) -> None:
        """Print the lines of stages that take long, and acknowledge Ctrl-C, until the block ends."""
        while True:
            readable, _, _ = select.select([self._signals], [], [], 1.0)
            if readable:
                received = self._signals.recv(16)
                if signal.SIGINT in received:
                    self._acknowledge()
                if received.endswith(_END):
                    return
            now = time.perf_counter()
            with self._lock:
                stage = self.current
                if stage is not None and now >= self._next_line:
                    self._next_line = now + LINE_S
                    self._write(stage.words(now), self._run.verbosity > QUIET and self._bars is None)

    def _acknowledge(self) -> None:
        stage = self.current
        step = f" in the stage {stage.name}" if stage else ""
        self._write(f"Ctrl-C received{step}: stopping as soon as the call under way returns.", True)

    def _write(self, line: str, shown: bool) -> None:
        with self._lock, contextlib.suppress(OSError, ValueError):  # a closed stderr or a full disk ends no build
            self._to_log(line)
            if shown and self._bars is not None:
                self._bars.console.print(line, markup=False, highlight=False)
            elif shown:
                click.echo(f"belle-compile: {line}", err=True)

    def _to_log(self, line: str) -> None:
        if self._log is not None:
            print(time.strftime("%Y-%m-%dT%H:%M:%S%z"), line, file=self._log, flush=True)


@contextlib.contextmanager
def _log_file(path: Path | None) -> Iterator[TextIO | None]:
    """Open a log to append to it; raises CompileError where that fails."""
    if path is None:
        yield None
        return
    try:
        log = path.open("a", encoding="utf-8")
    except OSError as error:
        what, remedy = f"log file {path}", "give another --log"
        raise CompileError("output", what, found=error.strerror or str(error), remedy=remedy) from None
    with log:
        yield log


@contextlib.contextmanager
def _bars(verbosity: int) -> Iterator[Bars | None]:
    """The bars on a terminal; None where stderr is none, where rich is not installed, or with --quiet."""
    if verbosity == QUIET or not sys.stderr.isatty():
        yield None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.text import Text
    except ModuleNotFoundError:
        yield None
        return

    class Count(ProgressColumn):
        """Units done, and the time left estimated over the whole stage."""

        def render(self, task: Task) -> Text:
            stage: Stage = task.fields["stage"]
            left = None if stage.seconds else stage.left_s(time.perf_counter())
            count = f"{stage.done:,}/{stage.total:,}" if stage.total else ""
            return Text(count + ("" if left is None else f"  about {duration(left)} left"))

    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), Count()
    with Progress(*columns, console=Console(stderr=True)) as bars:
        yield bars


def _reset_peak() -> None:
    """Let the peak memory of this process start again, where the kernel allows that."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def _peak_memory() -> int:
    """The peak memory in bytes since `_reset_peak`, or of the whole run where that had no effect."""
    with contextlib.suppress(OSError, ValueError), open("/proc/self/status") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    return _peak_of_process()


def _peak_of_process() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
