"""The ladder: from a model answered one request at a time to this server, step by step, under one load.

    python -m benchmarks.ladder smollm2-135m --requests FILE.jsonl           # everything, hours
    python -m benchmarks.ladder smollm2-135m --requests FILE.jsonl --quick   # fewer rounds, shorter samples
    python -m benchmarks.ladder CHECKPOINT --requests FILE.jsonl --only int8 padded continuous
    python -m benchmarks.ladder --report                                     # table and plot again

All steps answer the same requests: questions of the file (JSON lines with `question` and `std_answer`) in the frequencies of
Zipf's law behind one system prompt, with up to 32 tokens each. Every step is measured with the step before it, in turns, each
in a process of its own that is stopped while the other runs; ratios are medians of neighbours. A sample is a closed loop of
--users. To find how many users get 99% of their answers within the limits, their number is doubled until they do not, and then
the number between the last two is tried. With --target, the same is run on another device that the compiler builds for.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from belle_compile.runtime import Engine, host
from belle_compile.runtime.artifact import read_manifest
from benchmarks import machine
from benchmarks.engines import SHAPES
from benchmarks.ladder import claims, report
from benchmarks.ladder.steps import (
    BATCHING,
    ENGINES,
    LONGEST_ANSWER,
    LONGEST_BATCHED_ANSWER,
    STEPS,
    Step,
    make_engine,
    write_requests,
)
from benchmarks.ladder.workers import StepError, Worker
from benchmarks.peers.rounds import wait_until_quiet
from benchmarks.ranks import source
from benchmarks.serving.aiperf import FIRST_TOKEN_LIMIT_S, TOKEN_LIMIT_S
from benchmarks.serving.workloads import CHATS, Closed, Question, Workload, chats, read_questions

WORKLOAD = Workload("ladder", Closed(16), caches=True, repeats=True, shared_system_prompt=True)
BATCHED_WORKLOAD = Workload("batching", Closed(16))
MOST_USERS = 256  # that are tried
HELD = 0.99  # the share of answers within the limits that users must get to be held
LONGEST = 1024  # tokens of prompt and answer
QUIET_LIMIT_S = 20.0
Line = dict[str, Any]


class Requests:
    """Files of requests: no two of them share a prompt, so that what one sample leaves in caches does not help the next."""

    def __init__(
        self, folder: Path, engine: Path, questions: Sequence[Question], workload: Workload, longest_answer: int
    ) -> None:
        self._folder, self._engine, self._questions = folder, engine, questions
        self._workload, self._longest_answer = workload, longest_answer

    def new(self, number: int) -> Path:
        """The file of this number, the same whenever it is asked for."""
        path = self._folder / f"{self._workload.name}-{number}.jsonl"
        if not path.exists():
            sent = chats(self._workload, self._questions, number, CHATS)
            with Engine.load(self._engine, kv_tokens=LONGEST) as engine:
                write_requests(engine, sent, min(LONGEST, engine.max_context), self._longest_answer, path)
        return path


def held(worker: Worker, requests: Iterator[Path], seconds: float) -> tuple[int, list[Line]]:
    """Return the largest number of users found who get `HELD` of their answers within the limits, and the samples taken."""
    samples: list[Line] = []

    def holds(users: int) -> bool:
        samples.append(worker.sample(next(requests), users, seconds))
        return bool(samples[-1]["good"] >= HELD)

    good, users = 0, 1
    while users <= MOST_USERS and holds(users):
        good, users = users, 2 * users
    if good and users <= MOST_USERS and (middle := (good + users) // 2) > good and holds(middle):
        good = middle
    return good, samples


def in_turns(workers: Sequence[Worker], number: int, file: Path, users: int, seconds: float) -> dict[str, Line]:
    """A sample of each worker, every other round backwards."""
    found = {}
    for worker in workers if number % 2 == 0 else workers[::-1]:
        wait_until_quiet(QUIET_LIMIT_S)
        found[worker.name] = worker.sample(file, users, seconds)
        print(json.dumps({"step": worker.name, "round": number, **found[worker.name]}), flush=True)
    return found


def measure_pair(pair: Sequence[Worker], requests: Requests, arguments: argparse.Namespace) -> Line:
    """Samples of two steps in turns, with one user and with many."""
    alone, samples = [], []
    for number in range(arguments.rounds):
        alone.append(in_turns(pair, number, requests.new(2 * number), 1, arguments.seconds / 2))
        samples.append(in_turns(pair, number, requests.new(2 * number + 1), arguments.users, arguments.seconds))
    names = [worker.name for worker in pair]
    return {"steps": names, "samples": _by_name(names, samples), "alone": _by_name(names, alone)}


def _by_name(names: Sequence[str], rounds: Sequence[dict[str, Line]]) -> dict[str, list[Line]]:
    return {name: [found[name] for found in rounds] for name in names}


def measure_batching(folder: Path, requests: Requests, arguments: argparse.Namespace) -> Line:
    """Samples of padded and continuous batches on one engine, in turns."""
    with ExitStack() as stack:
        workers = [
            stack.enter_context(Worker(step.name, step.settings(folder, arguments.threads), _log(f"batching-{step.name}")))
            for step in BATCHING
        ]
        samples = [
            in_turns(workers, number, requests.new(number), arguments.users, arguments.seconds)
            for number in range(arguments.rounds)
        ]
    names = [worker.name for worker in workers]
    titles = {step.name: step.title for step in BATCHING}
    return {"titles": titles, "workload": BATCHED_WORKLOAD.describe(), "samples": _by_name(names, samples)}


def _log(name: str) -> Path:
    """The file for what a worker prints to the standard error."""
    logs = Path("build/ladder")
    logs.mkdir(parents=True, exist_ok=True)
    return logs / f"{name}.log"


def measure(
    steps: Sequence[Step], folders: dict[str, Path], requests: Requests, arguments: argparse.Namespace
) -> Iterator[Line]:
    """Yield the results of each pair of neighbours; each step's users are found once, in its first pair."""
    known: set[str] = set()
    for pair in pairwise(steps):
        with ExitStack() as stack:
            workers = []
            for step in pair:
                settings = step.settings(folders[step.engine], arguments.threads, arguments.device)
                workers.append(stack.enter_context(Worker(step.name, settings, _log(step.name))))
            found = measure_pair(workers, requests, arguments)
            found["held"] = {}
            for worker in workers:
                if worker.name not in known:
                    known.add(worker.name)
                    files = (requests.new(1000 + number) for number in range(1000))
                    users, samples = held(worker, files, arguments.seconds / 2)
                    found["held"][worker.name] = {"users": users, "samples": samples}
                    print(json.dumps({"step": worker.name, "held": users}), flush=True)
        yield found


def prepare(model: str, target: str, wanted: set[str], reuse: bool, requests: Path) -> tuple[str, dict[str, Path]]:
    """Return the model's name and, by their names, the folders of its engines; "" stands for the checkpoint."""
    checkpoint = source(model) if model in SHAPES else Path(model)
    name = model if model in SHAPES else checkpoint.name
    folders = {"": checkpoint}
    for engine in (engine for engine in ENGINES if engine in wanted):
        out = Path("build/engines") / f"ladder-{name}-{engine}-{target}"
        print(f"{out.name}: preparing", file=sys.stderr, flush=True)
        folders[engine] = make_engine(checkpoint, engine, target, out, reuse, requests)
    return name, folders


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for requests, below build, for the time of a run."""
    Path("build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir="build") as folder:
        yield Path(folder)


def run(arguments: argparse.Namespace) -> Path:
    """Measure, and write the results anew after each pair."""
    steps = [step for step in STEPS if step.name in (arguments.only or [step.name])]
    wanted = {step.engine for step in steps} | {"int8"} | (set() if arguments.no_claims else set(ENGINES) - {"int8-ranks"})
    name, folders = prepare(arguments.model, arguments.target, wanted, arguments.reuse, arguments.requests)
    questions = read_questions(arguments.requests)
    path: Path = arguments.out / f"ladder-{name}.json"
    result: Line = {
        "model": name, "target": arguments.target, "users": arguments.users, "rounds": arguments.rounds,
        "seconds": arguments.seconds, "threads": arguments.threads or len(host.usable_cores()), "workload": WORKLOAD.describe(),
        "questions": len(questions),
        "requests": {"file": arguments.requests.name, "sha256": hashlib.sha256(arguments.requests.read_bytes()).hexdigest()},
        "limits": {"first_token_s": FIRST_TOKEN_LIMIT_S, "token_s": TOKEN_LIMIT_S, "share": HELD},
        "titles": {step.name: step.title for step in steps}, "machine": machine.describe(), "pairs": [], "claims": {},
        "accuracy": read_manifest(folders["int8"]).accuracy,
    }  # fmt: skip
    arguments.out.mkdir(parents=True, exist_ok=True)

    def write() -> None:
        path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    if not arguments.no_claims:
        result["claims"] = claims.measure(folders, arguments.threads, arguments.rounds)
        print(json.dumps(result["claims"]), flush=True)
        write()
    with scratch() as folder:
        if not arguments.no_claims:
            varied = read_questions(arguments.requests, LONGEST_BATCHED_ANSWER)
            files = Requests(folder, folders["int8"], varied, BATCHED_WORKLOAD, LONGEST_BATCHED_ANSWER)
            result["claims"]["batching"] = measure_batching(folders["int8"], files, arguments)
            write()
        files = Requests(folder, folders["int8"], questions, WORKLOAD, LONGEST_ANSWER)
        for found in measure(steps, folders, files, arguments):
            result["pairs"].append(found)
            write()
    return path


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ladder", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help=f"a checkpoint, or one of {', '.join(SHAPES)}")
    parser.add_argument("--requests", type=Path, metavar="FILE", help="JSON lines with question and std_answer")
    parser.add_argument("--only", nargs="+", choices=[step.name for step in STEPS], help="only these steps")
    parser.add_argument("--target", default="cpu", help="the device of one rank, as for belle-compile build")
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20.0, help="of one sample; users are tried for half as long")
    parser.add_argument("--quick", action="store_true", help="2 rounds of 6 seconds")
    parser.add_argument("--threads", type=int, help="by default all cores")
    parser.add_argument("--device", default="cpu", help="where Transformers' model runs, such as cuda")
    parser.add_argument("--reuse", action="store_true", help="take engines in build/engines as they are")
    parser.add_argument("--no-claims", action="store_true", help="measure the steps only")
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    parser.add_argument("--page", type=Path, default=report.PAGE, help="the page that gets tables and plot")
    parser.add_argument("--report", action="store_true", help="write tables and plot again, from the results")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.seconds = 2, 6.0
    if not arguments.report and (arguments.requests is None or arguments.model is None):
        parser.error("a measurement needs a MODEL and --requests FILE")
    return arguments


def main() -> None:
    arguments = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no process of a step is left behind
    try:
        report.check(arguments.page)
        if not arguments.report:
            print(run(arguments))
        print(report.write(arguments.out, arguments.page))
    except StepError as error:
        raise SystemExit(f"ladder: {error}.") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
