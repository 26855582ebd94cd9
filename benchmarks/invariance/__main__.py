"""Answer the same requests in many ways and compare every token and every bit of the log probabilities.

    python -m benchmarks.invariance ENGINE requests.jsonl [--count 500] [--isa avx2] [--redis redis://…] [--out FILE]

The requests are JSON lines with `question`. The first way, each request alone with nothing cached, gives the answers that the
other ways are compared with. Each way loads the engine anew; an engine of several ranks is run by as many processes. The exit
code is 1 where an answer differs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from belle_compile.runtime import Engine
from belle_compile.runtime.artifact import read_manifest
from benchmarks import machine
from benchmarks.invariance.requests import cases, longest, read_questions
from benchmarks.invariance.ways import Answer, Facts, Way, answer, ways

LONGEST_ANSWER = 64


def main() -> int:
    """Run every way, print a table, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("requests", type=Path)
    parser.add_argument("--count", type=int, default=500, help="number of calls; some ask for several answers")
    parser.add_argument("--isa")
    parser.add_argument("--redis", help="URL of a server whose database may be written to")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("WAY", "FILE"), help="run one way and write its answers; used for ranks")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        every = ways(f"sqlite:{folder}/answers.db", options.redis)
        if options.one:
            name, file = options.one
            answers, facts = _run(every[name], options)
            Path(file).write_text(json.dumps([answers, facts]), encoding="utf-8")
            return 0
        count = read_manifest(options.engine).target.ranks
        return _compare(every, options, count, Path(folder))


def _compare(every: dict[str, Way], options: argparse.Namespace, count: int, folder: Path) -> int:
    expected: list[Answer] = []
    rows: list[dict[str, Any]] = []
    for name, way in every.items():
        started = time.perf_counter()
        answers, facts = _run(way, options) if count == 1 else _run_ranks(name, count, folder)
        expected = expected or answers
        different = [i for i, (one, other) in enumerate(zip(expected, answers, strict=True)) if not one.same(other)]
        row = {"way": name, "answers": len(answers), "different": len(different), "first_different": different[:5]}
        rows.append(row | facts | {"seconds": round(time.perf_counter() - started, 1)})
        print(json.dumps(rows[-1]), flush=True)
    if options.out:
        result = {
            "machine": machine.describe(),
            "engine": options.engine.name,
            "isa": options.isa,
            "ranks": count,
            "ways": rows,
        }
        options.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 1 if any(row["different"] for row in rows) else 0


def _run(way: Way, options: argparse.Namespace) -> tuple[list[Answer], Facts]:
    """Run one way in this process."""
    calls = cases(read_questions(options.requests), options.count, LONGEST_ANSWER)

    def load(**arguments: Any) -> Engine:
        return Engine.load(options.engine, isa=options.isa, **arguments)

    return answer(way, load, calls, longest(options.engine, calls))


def _run_ranks(name: str, count: int, folder: Path) -> tuple[list[Answer], Facts]:
    """Run one way by as many processes as the engine has ranks."""
    file = folder / "answers.json"
    arguments = [argument for argument in sys.argv[1:] if argument]
    mpiexec = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    command = [
        mpiexec or "mpiexec",
        "-n",
        str(count),
        sys.executable,
        "-m",
        "benchmarks.invariance",
        *arguments,
        "--one",
        name,
        str(file),
    ]
    subprocess.run(command, check=True)
    answers, facts = json.loads(file.read_text(encoding="utf-8"))
    return [_answer(*fields) for fields in answers], facts


def _answer(tokens: list[int], text: str, reason: str, *scores: list[list[Any]] | None) -> Answer:
    """Make an answer again from JSON."""
    pairs = [None if entries is None else tuple((int(token), float(score)) for token, score in entries) for entries in scores]
    return Answer(tuple(tokens), text, reason, pairs[0] or (), pairs[1] or (), pairs[2])


if __name__ == "__main__":
    sys.exit(main())
