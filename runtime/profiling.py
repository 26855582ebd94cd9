"""Where the time of steps goes: per kind of kernel, outside of kernels, and compared with the memory's bandwidth."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from belle_compile.runtime import host
from belle_compile.runtime.executors.batch import StepBatch
from belle_compile.runtime.memory import anonymous
from belle_compile.runtime.program import Program

_clock = time.perf_counter
_READS = 7


@dataclass(frozen=True)
class KernelTime:
    """All calls of one kind of kernel over one row count ("T" tokens, "R" logit rows) in one phase.

    `bytes` counts weights and, for attention, keys and values, each once a call. Activations are not counted: they stay in
    cache. `share_of_limit` is bytes a second over the read bandwidth, None where no bytes are counted.
    """

    kind: str
    rows: str
    calls: int
    seconds: float
    share_of_step: float
    bytes: int
    bytes_per_second: float
    share_of_limit: float | None


@dataclass(frozen=True)
class Phase:
    """All steps of one sort: "decode" where the logits of every token of the step are requested, "prefill" otherwise.

    `seconds` is the steps' wall time without the waiting for requests. `outside_s` of it is spent before and after the kernels
    (scheduling, sampling, detokenizing). Between two kernels only the clock is read, about 0.03 us, which counts as the
    kernel's time. `kernels` are in the order of the program.
    """

    name: str
    steps: int
    tokens: int
    seconds: float
    outside_s: float
    kernels: tuple[KernelTime, ...]


@dataclass(frozen=True)
class Profile:
    """The result of a profile. `read_bytes_per_second` is the limit, the larger of two measurements before and after it."""

    isa: str
    threads: int
    read_bytes_per_second: float
    phases: tuple[Phase, ...]

    def to_plain(self) -> dict[str, Any]:
        """The profile as JSON's types."""
        return asdict(self)

    def table(self) -> str:
        """The profile as text, with one table for each phase."""
        threads = f"{self.threads} thread{'s' * (self.threads != 1)}"
        limit = f"read bandwidth {self.read_bytes_per_second / 1e9:.1f} GB/s, {threads}, {self.isa}"
        tables = [_table(phase) for phase in self.phases]
        return "\n\n".join([*tables, f"{limit}; GB/s counts weights, keys and values"])


@dataclass
class _Sums:
    """Sums over the steps of one phase while it is recorded; arrays have an entry for each call of the program."""

    seconds: NDArray[np.float64]
    calls: NDArray[np.int64]
    steps: int = 0
    tokens: int = 0
    wall_s: float = 0.0
    kv_tokens: int = 0  # cached tokens that attention read, summed over steps
    kv_alone: int = 0  # of those, the ones of sequences with one token in the step

    def kv_of(self, kind: str) -> int:
        """Cached tokens that the kernels of one kind read."""
        runs = self.kv_tokens - self.kv_alone
        return {"attention": self.kv_tokens, "attention_alone": self.kv_alone, "attention_runs": runs}.get(kind, 0)


@dataclass
class ProfileHandle:
    """What `Engine.profile` yields; `result` is set when its `with` block has ended."""

    result: Profile | None = None


class Recorder:
    """Collects times: the step loop reports steps through `step`, and the executor their kernel calls through `walked`.

    Both are called on the loop's thread only. While nothing is recorded neither is called.
    """

    def __init__(self, program: Program, batch: StepBatch) -> None:
        self._program = program
        self._batch = batch
        self._walk: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None
        self._phases: dict[str, _Sums] = {}
        self._resumed = 0.0
        self._left_out_s = 0.0

    def walked(self, numbers: NDArray[np.int64], times: NDArray[np.int64]) -> None:
        """Take the calls of a step: their numbers in the program, and the nanoseconds, int64 [calls + 1], at which the first
        began and each ended."""
        self._walk = numbers, times

    def leave_out(self, seconds: float) -> None:
        """Subtract time that the step spends on work that later steps do not repeat."""
        self._left_out_s += seconds

    def step(self, run: Callable[[], None], more: Callable[[], bool]) -> None:
        """Run one step. The time until the next step counts too if `more()`, whether there is more work, returns True."""
        started = self._resumed or _clock()
        self._walk, self._left_out_s = None, 0.0
        run()
        if self._walk is not None:  # None: the step had no kernel calls to run
            self._add(_clock() - started - self._left_out_s, *self._walk)
        self._resumed = _clock() if more() else 0.0

    def profile(self, isa: str, threads: int, bandwidth: float) -> Profile:
        """The profile of what was recorded; `bandwidth` is the limit in bytes a second."""
        phases = (self._phase(name, bandwidth) for name in ("prefill", "decode") if name in self._phases)
        return Profile(isa, threads, bandwidth, tuple(phases))

    def _add(self, wall_s: float, numbers: NDArray[np.int64], times: NDArray[np.int64]) -> None:
        batch, count = self._batch, len(self._program.calls)
        name = "decode" if batch.tokens == batch.rows else "prefill"
        sums = self._phases.setdefault(name, _Sums(np.zeros(count), np.zeros(count, np.int64)))
        sums.seconds[numbers] += np.diff(times) * 1e-9
        sums.calls[numbers] += 1
        sums.steps += 1
        sums.tokens += batch.tokens
        sums.wall_s += wall_s
        contexts = np.zeros(batch.max_sequences, np.int64)
        np.maximum.at(contexts, batch.sequences[: batch.tokens], batch.positions[: batch.tokens] + 1)
        alone = np.bincount(batch.sequences[: batch.tokens], minlength=len(contexts)) == 1
        sums.kv_tokens += int(contexts.sum())
        sums.kv_alone += int(contexts[alone].sum())

    def _phase(self, name: str, bandwidth: float) -> Phase:
        sums = self._phases[name]
        groups: dict[tuple[str, str], list[int]] = {}
        for number, call in enumerate(self._program.calls):
            if sums.calls[number]:
                groups.setdefault((call.kind, call.rows), []).append(number)
        kernels = []
        for (kind, rows), numbers in groups.items():
            calls, seconds = int(sums.calls[numbers].sum()), float(sums.seconds[numbers].sum())
            read = sum(self._program.calls[n].bytes * int(sums.calls[n]) for n in numbers)
            read += len(numbers) * sums.kv_of(kind) * kv_bytes_per_token(self._program) // self._program.kv.layers
            rate = read / seconds
            share = rate / bandwidth if read else None
            kernels.append(KernelTime(kind, rows, calls, seconds, seconds / sums.wall_s, read, rate, share))
        outside = sums.wall_s - float(sums.seconds.sum())
        return Phase(name, sums.steps, sums.tokens, sums.wall_s, outside, tuple(kernels))


def kv_bytes_per_token(program: Program) -> int:
    """Bytes of keys and values of one token over all layers."""
    return program.kv.block_bytes // program.block_size


def read_bandwidth(threads: int, size: int | None = None) -> float:
    """Bytes a second that `threads` threads read from anonymous memory, the best of several passes.

    The runtime has no compiler, so libc's memcmp does the reading: it is vectorised, reads two streams, and ctypes lets threads
    call it at the same time. It keeps up with a kernel that prefetches (benchmarks/bandwidth.py). Where others use the machine
    too, both vary by a third between measurements, and a share of the limit may exceed 1. The memory, by default, is larger
    than the last-level cache; it is written first, so that its pages exist.
    """
    size = size or min(max(512 << 20, 4 * host.last_level_cache_bytes()), host.memory_bytes() // 8)
    libc = ctypes.CDLL(None)
    half = max(size // threads // 2 // 4096, 1) * 4096
    memory = anonymous(2 * half * threads)
    starts = [memory.ctypes.data + 2 * half * i for i in range(threads)]
    fill, compare = libc.memset, libc.memcmp
    fill.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
    compare.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)

    def together(work: Callable[[int], object]) -> float:
        others = [threading.Thread(target=work, args=(start,)) for start in starts[1:]]
        began = _clock()
        for thread in others:
            thread.start()
        work(starts[0])
        for thread in others:
            thread.join()
        return _clock() - began

    together(lambda start: fill(start, 1, 2 * half))
    return memory.size / min(together(lambda start: compare(start, start + half, half)) for _ in range(_READS))


def _table(phase: Phase) -> str:
    def line(label: str, rows: str, calls: int | None, seconds: float, rate: float = 0.0, share: float | None = None) -> str:
        counted = "" if calls is None else f"{calls / phase.steps:.0f}"
        read = f"{rate / 1e9:8.2f} {share:9.0%}" if share is not None else ""
        taken = f"{1e3 * seconds / phase.steps:11.3f}{seconds / phase.seconds:8.1%}"
        return f"  {label:<28}{rows:<4}{counted:>6}{taken}{read}"

    steps = f"{phase.steps} step{'s' * (phase.steps != 1)}"
    speed = f"{phase.tokens / phase.seconds:.1f} tokens/s"
    lines = [f"{phase.name}: {phase.tokens} tokens in {steps}, {1e3 * phase.seconds / phase.steps:.2f} ms a step, {speed}"]
    lines.append(f"  {'kernel':<28}{'rows':<4}{'calls':>6}{'ms/step':>11}{'share':>8}{'GB/s':>8}{'of limit':>10}")
    for kernel in sorted(phase.kernels, key=lambda kernel: -kernel.seconds):
        lines.append(
            line(kernel.kind, kernel.rows, kernel.calls, kernel.seconds, kernel.bytes_per_second, kernel.share_of_limit)
        )
    lines.append(line("schedule, sample, detokenize", "", None, phase.outside_s))
    return "\n".join(lines)
