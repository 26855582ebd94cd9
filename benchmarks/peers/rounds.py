"""Interleaved rounds: every sample in a new process on a machine that is quiet, beside a measurement of the read bandwidth."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.convert import Ready
from benchmarks.peers.home import FOLDER, last_line
from benchmarks.processes import machine_seconds
from benchmarks.tasks import TASKS, Task

QUIET_CORES = 0.12  # others may use this much while the machine counts as quiet
QUIET_LIMIT_S, TIMEOUT_S = 90.0, 900.0
GIVE_UP = 2  # failed processes of a row, after which it is left out of further rounds
VOCABULARY = 31000  # prompts use the ids below, where there are as many
Line = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How samples are taken."""

    threads: int
    tasks: tuple[Task, ...] = TASKS
    quiet_limit_s: float = QUIET_LIMIT_S
    timeout_s: float = TIMEOUT_S  # of one process


def method_digest() -> str:
    """SHA-256 of what decides how a sample is taken; samples of two methods are not put into one table."""
    files = [FOLDER / name for name in ("worker.py", "adapters.py", "ours.py", "rounds.py")] + [FOLDER.parent / "tasks.py"]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def run_rounds(
    ready: Sequence[Ready],
    model: Path,
    numbers: Sequence[int],
    settings: Settings,
    bandwidth: Callable[[], float],
    record: Callable[[Line], None],
) -> None:
    """A sample of every row for each round number, every other round backwards; `record` gets them one by one."""
    vocab = min(VOCABULARY, json.loads((model / "config.json").read_text())["vocab_size"])
    work = {"work": "bench", "tasks": [asdict(task) for task in settings.tasks], "vocab": vocab}
    failures = dict.fromkeys((one.row.name for one in ready), 0)
    for number in numbers:
        for one in ready if number % 2 == 0 else ready[::-1]:
            if failures[one.row.name] >= GIVE_UP:
                continue
            waited = wait_until_quiet(settings.quiet_limit_s)
            before = bandwidth()
            sample = run_worker(one, {**work, "seed": number}, settings.threads, settings.timeout_s)
            failures[one.row.name] += "error" in sample
            limit = round(max(before, bandwidth()), 2)
            record(describe(one, number) | {"waited_s": waited, "bandwidth": limit, **sample})
            print(f"{model.name}: round {number + 1}, {one.row.name}: {_short(sample)}", file=sys.stderr, flush=True)


def describe(one: Ready, number: int) -> Line:
    """What a sample says of its row."""
    row = one.row
    about = {"name": row.name, "peer": row.peer, "format": row.format, "option": row.option, "bits": row.bits}
    return {"kind": "sample", "round": number, **about, "bytes_per_token": one.bytes_per_token}


def run_worker(one: Ready, work: Line, threads: int, timeout: float) -> Line:
    """The result of worker.py under the row's interpreter, or {"error": one line} when it fails or takes too long."""
    adapter = {"adapter": one.row.adapter, "engine": str(one.engine), "option": one.row.option}
    request = json.dumps({**adapter, "cpus": sorted(os.sched_getaffinity(0)), **work})
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    environment = {**os.environ, **quiet, "PEERS_THREADS": str(threads)}
    # A session of its own lets the worker count the engine's child processes as its own and be killed with them.
    process = subprocess.Popen(
        [str(one.python), str(FOLDER / "worker.py")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=environment, start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(request, timeout)
    except subprocess.TimeoutExpired:
        return {"error": f"no result after {timeout:.0f} s"}
    finally:  # also when this command is interrupted
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    results = [line.removeprefix("RESULT ") for line in out.splitlines() if line.startswith("RESULT ")]
    if not results:
        return {"error": last_line(err, process.returncode)}
    result: Line = json.loads(results[-1])
    return result


def wait_until_quiet(limit: float) -> float | None:
    """Seconds waited until one second passed with almost no processor time used; None when the limit came first."""
    start = time.monotonic()
    while time.monotonic() - start < limit:
        before = machine_seconds()
        time.sleep(1)
        if machine_seconds() - before < QUIET_CORES:
            return round(time.monotonic() - start, 1)
    return None


def _short(sample: Line) -> str:
    if "error" in sample:
        return str(sample["error"])
    parts = [f"load {sample['load']} s", *(f"{name} {rate}" for name, (rate, _) in sample["tasks"].items())]
    return ", ".join([*parts, *(f"{name} failed: {error}" for name, error in sample["errors"].items())])
