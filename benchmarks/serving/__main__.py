"""Servers under load, side by side: AIPerf sends real questions to ours, and to those of others with the same weights.

    python -m benchmarks.serving ENGINE --requests FILE.jsonl            # ours alone
    python -m benchmarks.serving smollm2-135m --requests FILE.jsonl      # all of benchmarks/peers/servers.toml
    python -m benchmarks.serving smollm2-135m --requests FILE.jsonl --only belle vllm --workload users-16 --rounds 3
    python -m benchmarks.serving --report

The requests are JSON lines with `question` and, where there is one, `std_answer`, whose length the answer gets. Every workload
is one of benchmarks/serving/workloads.py. Servers stay loaded, are stopped (SIGSTOP) while another one is measured, and take
turns in every workload, every other round backwards. The client and the server share the machine: what AIPerf takes of it
stands beside every figure, and so does the time by which it sent requests late. Environments are made by
`benchmarks/peers/setup.sh aiperf vllm llama-server ov`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from belle_compile.runtime import host
from benchmarks import machine
from benchmarks.engines import SHAPES
from benchmarks.peers import models
from benchmarks.peers.home import LOGS, PACKAGES, VENVS, PeersError, installed, setup
from benchmarks.peers.rounds import wait_until_quiet
from benchmarks.peers.servers import CONFIG, ServerRow, choose, read_servers
from benchmarks.servers import NotReadyError, ServerProcess
from benchmarks.serving import report
from benchmarks.serving.aiperf import FIRST_TOKEN_LIMIT_S, TOKEN_LIMIT_S, AIPerfError, run
from benchmarks.serving.workloads import USERS, Closed, Question, Workload, chats, read_questions, workloads

MOST_USERS = 32  # answers that a server may work on at the same time, unless a workload has more users
WARM_UPS = 3  # requests before the first measured one
QUIET_LIMIT_S = 20.0


@dataclass(frozen=True)
class Settings:
    """How samples are taken: `aiperf` is its program, `tokenizer` a directory with a tokenizer that it can load."""

    aiperf: Path
    tokenizer: Path
    rounds: int
    seconds: float
    threads: int


@dataclass(frozen=True)
class Ready:
    """A server whose engine is there."""

    row: ServerRow
    engine: Path


Record = Callable[[dict[str, Any]], None]


def measure(
    ready: Sequence[Ready],
    chosen: Sequence[Workload],
    questions: Sequence[Question],
    model: str,
    settings: Settings,
    record: Record,
) -> None:
    """Measure all workloads on all servers; `record` gets the samples one by one, and what failed."""
    for caches in (False, True):
        same = [workload for workload in chosen if workload.caches == caches]
        if not same:
            continue
        users = max([MOST_USERS, *(each.arrivals.users for each in same if isinstance(each.arrivals, Closed))])
        with ExitStack() as stack:
            running = _start(ready, model, users, settings.threads, caches, stack, record)
            for number in range(settings.rounds):
                for workload in same:
                    sent = chats(workload, questions, number)
                    for one, server in running if number % 2 == 0 else running[::-1]:
                        record(_sample(one, server, workload, number, sent, settings))


def _start(
    ready: Sequence[Ready], model: str, users: int, threads: int, caches: bool, stack: ExitStack, record: Record
) -> list[tuple[Ready, ServerProcess]]:
    """Start the servers one after the other, warm them up and stop their processes. One that does not start is left out."""
    running = []
    LOGS.mkdir(parents=True, exist_ok=True)
    for one in ready:
        log = LOGS / f"server-{model}-{one.row.name.replace(' ', '-')}.log"
        server = one.row.start(one.engine, model, threads, users, caches=caches, log=log)
        stack.callback(server.stop)
        try:
            server.wait()
            for number in range(WARM_UPS):
                message = {"role": "user", "content": f"{number}: 你好"}
                server.post("/v1/chat/completions", {"messages": [message], "max_tokens": 16, "temperature": 0})
        except (NotReadyError, OSError) as error:
            record({"server": one.row.name, "caches": caches, "error": str(error)})
            server.stop()
            continue
        server.pause()
        running.append((one, server))
    return running


def _sample(
    one: Ready, server: ServerProcess, workload: Workload, number: int, sent: Sequence[Any], settings: Settings
) -> dict[str, Any]:
    about = {"server": one.row.name, "workload": workload.name, "round": number}
    wait_until_quiet(QUIET_LIMIT_S)
    server.resume()
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = run(settings.aiperf, server, workload, sent, settings.tokenizer, Path(folder), settings.seconds)
    except AIPerfError as error:
        return about | {"error": str(error)}
    finally:
        server.pause()
    return about | found.to_plain()


def prepare(model: str, only: Sequence[str], environments: bool) -> tuple[str, list[Ready], dict[str, str]]:
    """Return the model's name, the servers that can be measured, and the errors of those that cannot."""
    rows = read_servers(CONFIG)
    if (Path(model) / "manifest.json").is_file():
        (ours,) = (row for row in rows if row.row.is_ours)
        return Path(model).name, [Ready(ours, Path(model))], {}
    if model not in SHAPES:
        raise PeersError(f"{model!r} is neither an engine directory nor one of {', '.join(SHAPES)}")
    chosen = choose(rows, model, only)
    needed = dict.fromkeys(each for row in chosen for each in row.environments)
    failed = setup([*needed, "aiperf"]) if environments else {}
    checkpoint, ready = models.make(model), []
    for row in chosen:
        try:
            ready.append(Ready(row, row.engine(checkpoint)))
        except PeersError as error:
            failed[row.name] = str(error)
            print(f"{row.name}: {error}", file=sys.stderr, flush=True)
    return model, ready, failed


def write_tokenizer(engine: Path, folder: Path) -> Path:
    """Put the tokenizer of an engine of ours into a directory that Transformers, and so AIPerf, can load."""
    (folder / "tokenizer.json").write_bytes((engine / "tokenizer.json").read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


def compare(model: str, arguments: argparse.Namespace) -> Path:
    """Measure one model and write its results, anew after each sample."""
    questions = read_questions(arguments.requests)
    name, ready, failed = prepare(model, arguments.only, arguments.environments)
    ours = next((one for one in ready if one.row.row.is_ours), None)
    if ours is None:
        raise PeersError("a comparison needs our server: its tokenizer counts, and the others are compared with it")
    chosen = chosen_workloads(arguments)
    path: Path = arguments.out / f"{name}.json"
    peers = {"aiperf", *(one.row.peer for one in ready)}
    about: dict[str, Any] = {
        "model": name,
        "requests": {"file": arguments.requests.name, "sha256": hashlib.sha256(arguments.requests.read_bytes()).hexdigest()},
        "questions": len(questions), "rounds": arguments.rounds, "seconds": arguments.seconds, "threads": arguments.threads,
        "limits": {"first_token_s": FIRST_TOKEN_LIMIT_S, "token_s": TOKEN_LIMIT_S},
        "versions": {peer: installed(peer) for peer in PACKAGES if peer in peers},
        "workloads": {workload.name: workload.describe() for workload in chosen},
        "servers": [one.row.name for one in ready], "failed": failed, "machine": machine.describe(), "samples": [],
    }  # fmt: skip
    arguments.out.mkdir(parents=True, exist_ok=True)

    def record(sample: dict[str, Any]) -> None:
        about["samples"].append(sample)
        print(json.dumps(sample, ensure_ascii=False), flush=True)
        path.write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = write_tokenizer(ours.engine, Path(folder))
        settings = Settings(arguments.aiperf, tokenizer, arguments.rounds, arguments.seconds, arguments.threads)
        measure(ready, chosen, questions, name, settings, record)
    return path


def chosen_workloads(arguments: argparse.Namespace) -> list[Workload]:
    """The workloads asked for, in their usual order."""
    every = workloads(arguments.users, arguments.rate)
    known = [workload.name for workload in every]
    if unknown := [name for name in arguments.workload or [] if name not in known]:
        raise PeersError(f"unknown workload {', '.join(unknown)}; expected some of {', '.join(known)}")
    return [workload for workload in every if workload.name in (arguments.workload or known)]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"an engine directory, or one of {', '.join(SHAPES)}")
    parser.add_argument("--requests", type=Path, metavar="FILE", help="JSON lines with question and std_answer")
    parser.add_argument("--only", nargs="+", default=[], metavar="PEER|SERVER", help=f"these of {CONFIG.name}")
    parser.add_argument("--workload", nargs="+", metavar="NAME", help="only these; by default all")
    parser.add_argument("--users", nargs="+", type=int, default=list(USERS), help="of the closed loops")
    parser.add_argument("--rate", type=float, default=4.0, help="requests a second of the workload poisson")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20.0, help="of one sample")
    parser.add_argument("--threads", type=int, default=len(host.usable_cores()))
    parser.add_argument("--aiperf", type=Path, default=VENVS / "aiperf" / "bin" / "aiperf", help="the program")
    parser.add_argument("--no-environments", dest="environments", action="store_false", help="do not run setup.sh")
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    parser.add_argument("--report", action="store_true", help="write the tables again, from the results")
    arguments = parser.parse_args()
    if not arguments.report and (arguments.requests is None or not arguments.models):
        parser.error("a measurement needs a MODEL and --requests FILE")
    return arguments


def main() -> None:
    arguments = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no server is left behind
    os.environ.setdefault("PYTHON", sys.executable)  # of the environments that setup.sh makes
    try:
        for model in arguments.models:
            compare(model, arguments)
        print(report.write(arguments.out))
    except PeersError as error:
        raise SystemExit(f"serving: {error}.") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
