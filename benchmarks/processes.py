"""Processes of a measurement: those that one has started, and the processor time that they take meanwhile."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from bisect import bisect_left
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

MACHINE = "machine"
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def descendants(process: int) -> list[int]:
    """Return the ids of the processes that `process` has started, and of those that they have."""
    found: list[int] = []
    for thread in _threads(process):
        try:
            started = list(map(int, Path(f"/proc/{process}/task/{thread}/children").read_text().split()))
        except OSError:  # the thread or the process has ended meanwhile
            continue
        for child in started:
            found += [child, *descendants(child)]
    return found


def _threads(process: int) -> list[str]:
    """The ids of the threads of a process; none of one that has ended, even while they are listed."""
    try:
        return os.listdir(f"/proc/{process}/task")
    except OSError:
        return []


def signal_tree(process: int, number: signal.Signals) -> None:
    """Send a signal to `process` and its descendants, such as SIGSTOP to those that are not measured now."""
    for each in (process, *descendants(process)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, number)


def cpu_seconds(process: int) -> dict[int, float]:
    """Return the processor time of `process` and of its descendants so far, by process id."""
    times: dict[int, float] = {}
    for each in (process, *descendants(process)):
        try:
            fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        times[each] = (int(fields[11]) + int(fields[12])) * _TICK_S
    return times


def machine_seconds() -> float:
    """Return the processor time that everything on this machine has used since it was started."""
    ticks = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    return (sum(ticks[:3]) + sum(ticks[5:8])) * _TICK_S


class CpuMeter:
    """Samples the processor time of several process trees, by name, and of the machine while its `with` block runs.

    Each sample is the wall time (`time.time`) and the seconds that every tree has used up to then. A process that ends keeps
    the time that its last sample saw.
    """

    def __init__(self, trees: Mapping[str, int], every_s: float = 0.1) -> None:
        self._trees, self._every_s = trees, every_s
        self._seen: dict[str, dict[int, float]] = {name: {} for name in trees}
        self._times: list[float] = []
        self._used: dict[str, list[float]] = {name: [] for name in (*trees, MACHINE)}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def cores(self, name: str, start: float, end: float) -> float:
        """Return how many cores a tree, or with `MACHINE` everything, kept busy on average between two wall times."""
        if end <= start or len(self._times) < 2:
            return 0.0
        return (self._at(name, end) - self._at(name, start)) / (end - start)

    def _at(self, name: str, moment: float) -> float:
        """The seconds that a tree had used at a wall time, between the two samples around it."""
        times, used = self._times, self._used[name]
        right = min(max(bisect_left(times, moment), 1), len(times) - 1)
        share = (moment - times[right - 1]) / (times[right] - times[right - 1])
        return used[right - 1] + min(max(share, 0.0), 1.0) * (used[right] - used[right - 1])

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            self._sample()

    def _sample(self) -> None:
        self._times.append(time.time())
        for name, process in self._trees.items():
            self._seen[name] |= cpu_seconds(process)
            self._used[name].append(sum(self._seen[name].values()))
        self._used[MACHINE].append(machine_seconds())

    def __enter__(self) -> CpuMeter:
        self._sample()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()
