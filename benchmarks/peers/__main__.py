"""Our engines and the peers side by side: environments, checkpoints, engines, interleaved rounds, report.

    python -m benchmarks.peers                                    # smollm2-135m llama-1b bloom-1b1, 5 rounds
    python -m benchmarks.peers llama-1b --only belle llama ov --rounds 3 --append
    python -m benchmarks.peers smollm2-135m --ours isa=avx2       # our AVX2 kernels as one more row
    python -m benchmarks.peers llama-7b --prepare                 # everything but the measurement

What is complete is kept: everything of the peers under PEERS_HOME (~/.cache/belle-peers), our engines in build/engines. A row
that cannot be made or run stands in the tables with its error. Writes results/peers/SHAPE.jsonl, of which the report is made.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from belle_compile.runtime import host
from benchmarks import machine
from benchmarks.bandwidth import ReadBandwidth
from benchmarks.engines import DEFAULT_SHAPES, SHAPES
from benchmarks.peers import report
from benchmarks.peers.convert import prepare_all, sources_digest
from benchmarks.peers.home import MODELS, PACKAGES, PeersError, installed, run_logged, setup
from benchmarks.peers.models import make
from benchmarks.peers.rounds import QUIET_LIMIT_S, Line, Settings, method_digest, run_rounds, wait_until_quiet
from benchmarks.peers.rows import CONFIG, OURS, Row, choose, read_rows
from benchmarks.tasks import TASKS, Task

RUNNING = Path("build/peers")  # samples of a run that is not complete


def compare(shape: str, rows: list[Row], failed_peers: dict[str, str], arguments: argparse.Namespace) -> None:
    """One shape from checkpoint to results."""
    if not (MODELS / shape / "config.json").is_file():
        print(f"{shape}: making the checkpoint", flush=True)
        # A process of its own, here and for conversions: torch must not stay in the one that waits for samples.
        run_logged([sys.executable, "-m", "benchmarks.peers.models", shape], f"checkpoint-{shape}")
    model = make(shape)
    ready, failed = prepare_all(rows, model, failed_peers)
    if arguments.prepare:
        return
    if not ready:
        raise PeersError(f"nothing can be run; the first error: {failed[0][1]}")
    RUNNING.mkdir(parents=True, exist_ok=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    running, results = RUNNING / f"{shape}.jsonl", arguments.out / f"{shape}.jsonl"
    about = run_line(shape, rows, arguments)
    kept = kept_lines(results, about) if arguments.append else []
    first = 1 + max((line["round"] for line in kept if line["kind"] == "sample"), default=-1)
    running.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def record(line: Line) -> None:
        with running.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

    record(about)
    for row, error in failed:
        record({"kind": "failed", "name": row.name, "peer": row.peer, "bits": row.bits, "error": error})
    wait_until_quiet(arguments.quiet_limit)
    bandwidth = ReadBandwidth(arguments.threads, mebibytes=1024)
    numbers = range(first, first + arguments.rounds)
    settings = Settings(arguments.threads, chosen_tasks(arguments), quiet_limit_s=arguments.quiet_limit)
    run_rounds(ready, model, numbers, settings, lambda: bandwidth.measure(5), record)
    results.write_text(running.read_text(encoding="utf-8"), encoding="utf-8")
    running.unlink()
    print(results)


def run_line(shape: str, rows: list[Row], arguments: argparse.Namespace) -> Line:
    """What the samples after it were taken on, with what, and how."""
    peers = [peer for peer in PACKAGES if any(row.peer == peer for row in rows)]
    return {
        "kind": "run",
        "shape": shape,
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "time": datetime.now().isoformat(" ", "minutes"),
        "peers": {peer: installed(peer) for peer in peers},
        "sources": sources_digest(),
        "commit": commit(),
        "method": method_digest(),
        "machine": machine.describe(),
        "tasks": {task.name: task.describe() for task in chosen_tasks(arguments)},
    }


def chosen_tasks(arguments: argparse.Namespace) -> tuple[Task, ...]:
    """Those asked for, in their usual order."""
    return tuple(task for task in TASKS if task.name in (arguments.task or [task.name]))


def kept_lines(results: Path, about: Line) -> list[Line]:
    """Lines of an earlier run of this day on this machine with these engines; none, and a word, where it is another."""
    if not results.is_file():
        return []
    lines = [json.loads(text) for text in results.read_text(encoding="utf-8").splitlines()]
    earlier = [line for line in lines if line["kind"] == "run"]
    if earlier and all(_conditions(line) == _conditions(about) and _same_peers(line, about) for line in earlier):
        return lines
    print(f"{results}: of another day, machine or version, so it is replaced, not appended to", file=sys.stderr)
    return []


def _conditions(run: Line) -> dict[str, Any]:
    same = {key: run["machine"][key] for key in ("processor", "cores", "memory_gib", "instruction_sets", "date")}
    return same | {key: run[key] for key in ("threads", "sources", "method", "tasks")}


def _same_peers(one: Line, other: Line) -> bool:
    """Whether the peers of both runs are of the same versions."""
    return all(one["peers"].get(peer, versions) == versions for peer, versions in other["peers"].items())


def commit() -> str | None:
    """The checkout's commit, with a + after changes; None outside of a checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=10", "--dirty=+"]
    try:
        found = subprocess.run(git, capture_output=True, text=True)
    except OSError:
        return None
    return found.stdout.strip() if found.returncode == 0 else None


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--append", action="store_true", help="add rounds to results of this day, machine and version")
    parser.add_argument("--only", nargs="+", default=[], metavar="PEER|ROW", help=f"these of {CONFIG.name}; ours is {OURS}")
    parser.add_argument("--ours", nargs="+", default=[], metavar="OPTION", help="ours again with an option, such as isa=avx2")
    parser.add_argument("--task", action="append", choices=[task.name for task in TASKS], help="only this one; repeatable")
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--threads", type=int, default=len(host.usable_cores()))
    parser.add_argument("--quiet-limit", type=float, default=QUIET_LIMIT_S, help="seconds to wait for a quiet machine")
    parser.add_argument("--prepare", action="store_true", help="stop before the rounds")
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    arguments = parser.parse_args()
    if unknown := set(arguments.shapes) - set(SHAPES):
        parser.error(f"unknown shape {', '.join(sorted(unknown))}; expected some of {', '.join(SHAPES)}")
    return arguments


def main() -> None:
    arguments = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a worker is not left behind
    os.environ.setdefault("PYTHON", sys.executable)  # of the environments that setup.sh makes
    try:
        shapes = arguments.shapes or list(DEFAULT_SHAPES)
        rows = {shape: choose(read_rows(arguments.config), shape, arguments.only, arguments.ours) for shape in shapes}
        peers = list(dict.fromkeys(row.peer for chosen in rows.values() for row in chosen if not row.is_ours))
        failed_peers = setup(peers)
        errors = []
        for shape, chosen in rows.items():
            try:
                compare(shape, chosen, failed_peers, arguments)
            except PeersError as error:  # the other shapes can be measured all the same
                errors.append(f"{shape}: {error}")
                print(errors[-1], file=sys.stderr, flush=True)
        if len(errors) < len(shapes) and not arguments.prepare:
            print(report.write(arguments.out))
        if errors:
            raise PeersError("; ".join(errors))
    except PeersError as error:
        raise SystemExit(f"peers: {error}.") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
