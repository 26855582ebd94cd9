"""Builds a release of BELLE-7B's shape: one pickle of 28.3 GB in float32. Reports how long that takes, and how much memory.

The pickle is written by PyTorch, without values, which are then filled in: no more than a few megabytes of it are in memory.
It needs 37 GB of disk, which are free again at the end, unless with --keep. The engine is then loaded outside of the control
group, gives its golden answers and continues a prompt:

    python -m benchmarks.build_belle_7b build/belle-7b
    python -m benchmarks.build_belle_7b build/belle-7b --control-group /sys/fs/cgroup/memory/belle   # made with a limit of 4 GB
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.belle_7b import GPTQ_NAME, GROUP, RANK, write_adapter, write_gptq, write_release
from benchmarks.machine import describe

OUT = Path(__file__).with_name("results") / "build-belle-7b.json"
MOST_BYTES = 4_000_000_000
PROMPT = "1, 2, 3, 4, 5, 6, 7, 8,"
_SAMPLED_S = 0.2  # between two looks at the memory of a process


@dataclass(frozen=True)
class Release:
    """What a release of the benchmark is, in words; how its checkpoint is written to a directory with a number of layers, and
    the arguments of a build besides the checkpoint's path, which may write more files to the folder."""

    words: str
    write: Callable[[Path, int | None], Path]
    place: str  # of the checkpoint, below its directory
    more: Callable[[Path, Path], list[str]] = lambda folder, checkpoint: []


def _with_adapter(folder: Path, checkpoint: Path) -> list[str]:
    adapter = folder / "adapter"
    return ["--adapter", str(adapter if adapter.exists() else write_adapter(adapter, checkpoint))]


_PICKLE = "one pickle in float32, as PyTorch 1.6 and later write them"
RELEASES = {
    "pickle": Release(_PICKLE, write_release, ""),
    "adapter": Release(
        f"{_PICKLE}; with a LoRA adapter of rank {RANK} over queries, keys and values of each layer",
        write_release,
        "",
        _with_adapter,
    ),
    "gptq": Release(f"{GPTQ_NAME}: GPTQ with 8 bits in groups of {GROUP}, embedding in float16", write_gptq, GPTQ_NAME),
}


class ControlGroup:
    """A group of the memory controller, of version 1 or 2, that limits processes to `MOST_BYTES`, page cache included.

    It is made where there is none, and then removed at the end.
    """

    def __init__(self, directory: Path) -> None:
        self._directory, self._made = directory, not directory.exists()
        directory.mkdir(exist_ok=True)
        names = {"limit": "memory.max", "peak": "memory.peak"}
        if not (directory / names["limit"]).exists():
            names = {"limit": "memory.limit_in_bytes", "peak": "memory.max_usage_in_bytes"}
        self._names = names
        if self._made:
            (directory / names["limit"]).write_text(str(MOST_BYTES))

    def join(self) -> None:
        """Move this process into the group."""
        (self._directory / "cgroup.procs").write_text(str(os.getpid()))

    def figures(self) -> dict[str, int]:
        """The limit and the peak in bytes, and the number of processes that the kernel ended for memory."""
        figures = {f"{name}_bytes": int((self._directory / file).read_text()) for name, file in self._names.items()}
        for name in ("memory.events", "memory.oom_control"):
            with suppress(OSError):
                counts = dict(line.split() for line in (self._directory / name).read_text().splitlines())
                figures["processes_killed"] = int(counts["oom_kill"])
        return figures

    def remove(self) -> None:
        """Remove a group that was made here."""
        if self._made:
            self._directory.rmdir()


def measured(command: Sequence[str], group: ControlGroup | None = None) -> tuple[str, dict[str, Any]]:
    """Run a command; returns what it prints, and its wall and processor seconds and peak memory. The peaks of memory that
    belongs to no file, and of pages of files, are the largest of samples."""
    spent, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    join = None if group is None else group.join
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=join)
    peaks = {"VmHWM": 0, "RssAnon": 0, "RssFile": 0}

    def sample() -> None:
        while process.poll() is None:
            with suppress(OSError, ValueError):
                for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                    if (name := line.partition(":")[0]) in peaks:
                        peaks[name] = max(peaks[name], int(line.split()[1]) << 10)
            time.sleep(_SAMPLED_S)

    sampling = threading.Thread(target=sample, daemon=True)
    sampling.start()
    printed = process.communicate()[0]
    sampling.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}: {printed}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return printed, {
        "wall_seconds": round(time.perf_counter() - began, 1),
        "processor_seconds": round(after.ru_utime + after.ru_stime - spent.ru_utime - spent.ru_stime, 1),
        "largest_process_bytes": peaks["VmHWM"],
        "anonymous_bytes": peaks["RssAnon"],
        "file_pages_bytes": peaks["RssFile"],
    }


def build(checkpoint: Path, engine: Path, group: ControlGroup | None, more: Sequence[str]) -> tuple[dict[str, Any], str]:
    """Build a checkpoint in a process of its own, with `more` arguments; returns what the build says of itself and what was
    measured, and its command."""
    arguments = ["build", str(checkpoint), *more, "--target", "cpu", "-o", str(engine), "--json"]
    printed, figures = measured([sys.executable, "-m", "belle_compile.compiler", *arguments], group)
    made = json.loads(printed)
    figures = {**made["build"], **figures, "requires": made["target"]["requires"], "self_test": made["self_test"]}
    if group is not None:
        figures["control_group"] = group.figures()
    return figures, " ".join(["belle-compile", *arguments])


def run(engine: Path, self_test: bool) -> dict[str, Any]:
    """Load the engine in processes of their own, without a limit of memory: an answer to a prompt, and its self-test."""
    command = [sys.executable, "-m", "belle_compile.runtime", str(engine), "--json"]
    runs = {"answer": [PROMPT, "--max-new-tokens", "16"]} | ({"self_test": ["--self-test"]} if self_test else {})
    results = {}
    for name, arguments in runs.items():
        printed, figures = measured([*command, *arguments])
        results[name] = json.loads(printed) | figures
    return results


def _bytes_of(directory: Path) -> int:
    return sum(each.stat().st_size for each in directory.rglob("*") if each.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--release", choices=RELEASES, default="pickle", help="What is built.  [default: pickle]")
    parser.add_argument("--layers", type=int, help="Fewer layers than the 30 of BELLE-7B.")
    parser.add_argument("--isa", help="Kernels for this instruction set alone, which takes a part of the time to compile.")
    parser.add_argument("--control-group", type=Path, help="A directory of the memory controller to run the build in.")
    parser.add_argument("--keep", action="store_true", help="Keep checkpoint and engine. A checkpoint that is there is used.")
    parser.add_argument("--note", default="", help="What else the result should say, such as what else the machine did.")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    release, directory, engine = RELEASES[arguments.release], folder / "BELLE-7B", folder / "engine"
    group = None if arguments.control_group is None else ControlGroup(arguments.control_group)
    try:
        began = time.perf_counter()
        if not directory.exists():
            release.write(directory, arguments.layers)
            print(f"{_bytes_of(directory):,} bytes written in {time.perf_counter() - began:.0f} s", flush=True)
        checkpoint = directory / release.place
        loads = [os.getloadavg()[0]]
        more = release.more(folder, checkpoint) + (["--isa", arguments.isa] if arguments.isa else [])
        figures, command = build(checkpoint, engine, group, more)
        loads.append(os.getloadavg()[1])
        result = {
            "checkpoint": {
                "shape": "BELLE-7B-2M: BLOOM, 30 layers, 4096 wide, 250,880 tokens"
                + ("" if arguments.layers is None else f", of which {arguments.layers} layers"),
                "release": release.words,
                "bytes": _bytes_of(directory),
            },
            "build": figures,
            "build_command": command,
            "engine_bytes": _bytes_of(engine),
            "outside_of_the_control_group": run(engine, figures["self_test"]["prompts"] > 0),
            "allowed_bytes": MOST_BYTES,
            "load_average": {"before": round(loads[0], 1), "at the end of the build": round(loads[1], 1)},
            "note": arguments.note,
            "machine": describe(),
        }
    finally:
        if not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)
        if group is not None:
            group.remove()
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
