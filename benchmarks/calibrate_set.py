"""Selects a calibration set from 100,000 requests made of real ones: seconds, memory, and whether the report is right.

    python -m benchmarks.calibrate_set ../shared/data/belle_eval_700.jsonl
    python -m benchmarks.calibrate_set requests.jsonl --tokenizer /models/BELLE-7B-2M

What is put in is known: requests that have little in common (the real ones, and pieces of them joined anew), copies of these
that differ at most in case, width and white space, others with one character changed, empty ones and very long ones. Every
selection is timed in a fresh process, from its start to its end. A last one keeps all it may, to see which lines were dropped.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from belle_compile.compiler.requests.duplicates import normalized, shingles
from benchmarks import machine

ROOT = Path(__file__).parents[1]
REQUESTS = ROOT.parent / "shared" / "data" / "belle_eval_700.jsonl"
OUT = ROOT / "benchmarks" / "results" / "calibrate-set.json"

MOST_SECONDS, MOST_BYTES = 120, 2e9
EMPTY, LONG = 100, 50
DISTINCT_SHARE, EXACT_SHARE = 0.4, 0.3  # the rest are near duplicates
DISTINCT, NEAR = 0.6, 0.9  # distinct requests overlap by less, near duplicates by more
# Peak memory as the kernel counts it since exec: a process's ru_maxrss begins with what its parent had.
_COMMAND = """
import sys
from belle_compile.compiler import cli
try:
    cli.main(sys.argv[1:])
finally:
    sys.stderr.write(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:")))
"""
_PIECE = re.compile(r"[^，。！？；：、\n,.!?;:]{4,40}[，。！？；：、\n,.!?;:]?")


@dataclass(frozen=True)
class Made:
    """A request, and why it is to be dropped ("" if it is to be kept)."""

    text: str
    label: str
    reason: str = ""


class Originals:
    """Requests of which any two overlap by less than `DISTINCT`: a new one is held against those it shares two pieces with."""

    def __init__(self, real: Sequence[tuple[str, str]], chance: random.Random) -> None:
        self.made: list[Made] = []
        self._chance = chance
        self._labels = [label for _, label in real]
        self._pieces = sorted({piece for text, _ in real for piece in _PIECE.findall(text)})
        self._grams: list[set[str]] = []
        self._sharing: dict[tuple[str, str], list[int]] = {}
        for text, label in real:
            self._add(text, label)

    def try_joined(self) -> None:
        """One more, of 4 to 9 pieces, unless it overlaps with another."""
        pieces = self._chance.sample(self._pieces, self._chance.randint(4, 9))
        self._add("".join(pieces), self._chance.choice(self._labels))

    def _add(self, text: str, label: str) -> None:
        grams = set(shingles(normalized(text)))
        pairs = [*combinations(sorted(set(_PIECE.findall(text))), 2)] or [(text, text)]
        near = {place for pair in pairs for place in self._sharing.get(pair, ())}
        if any(overlap(grams, self._grams[place]) >= DISTINCT for place in near):
            return
        for pair in pairs:
            self._sharing.setdefault(pair, []).append(len(self.made))
        self.made.append(Made(text, label))
        self._grams.append(grams)


def overlap(one: set[str], other: set[str]) -> float:
    return len(one & other) / len(one | other)


def copied(original: Made, chance: random.Random) -> Made:
    """The same request as people send it again."""
    text = chance.choice((str, str.upper, wide, "  {} \n".format, lambda text: text.replace(" ", "  ")))(original.text)
    return Made(text, original.label, "exact duplicate")


def wide(text: str) -> str:
    """ASCII characters in full width."""
    return "".join(chr(ord(each) + 0xFEE0) if "!" <= each <= "~" else each for each in text)


def changed(original: Made, chance: random.Random) -> Made | None:
    """The request with another character somewhere; None if that makes too much of a difference."""
    place = chance.randrange(len(original.text))
    text = original.text[:place] + chr(0x4E00 + chance.randrange(5000)) + original.text[place + 1 :]
    grams, others = set(shingles(normalized(text))), set(shingles(normalized(original.text)))
    return Made(text, original.label, "near duplicate") if NEAR <= overlap(grams, others) < 1 else None


def make(real: Sequence[tuple[str, str]], count: int, seed: int = 1) -> list[Made]:
    """`count` requests in an order where each original comes before what was made of it."""
    chance = random.Random(seed)
    originals = Originals(real, chance)
    while len(originals.made) < DISTINCT_SHARE * count:
        originals.try_joined()
    placed = [(chance.random(), made) for made in originals.made]
    before = max(place for place, _ in placed)
    seen = {normalized(made.text) for made in originals.made}
    copies = round(EXACT_SHARE * count)
    while len(placed) < len(originals.made) + copies:
        place, original = chance.choice(placed[: len(originals.made)])
        placed.append((chance.uniform(place, before + 1), copied(original, chance)))
    while len(placed) < count - EMPTY - LONG:
        place, original = chance.choice(placed[: len(originals.made)])
        near = changed(original, chance)
        if near is not None and normalized(near.text) not in seen:
            seen.add(normalized(near.text))
            placed.append((chance.uniform(place, before + 1), near))
    labels = [label for _, label in real]
    placed += [(chance.random(), Made(" \n" * chance.randrange(3), chance.choice(labels), "empty")) for _ in range(EMPTY)]
    for _ in range(LONG):
        text = "".join(chance.choice(originals.made).text for _ in range(2000))[:40_000]
        placed.append((chance.random(), Made(text, chance.choice(labels), "too long")))
    return [made for _, made in sorted(placed, key=lambda entry: entry[0])]


def timed(arguments: Sequence[str]) -> tuple[float, int, dict[str, Any]]:
    """Seconds and peak bytes of `belle-compile calibrate-set` in a process of its own, and what it printed."""
    command = [sys.executable, "-c", _COMMAND, "calibrate-set", *arguments, "--json", "--force"]
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"belle-compile {' '.join(command[3:])}: {done.stderr}")
    return seconds, int(done.stderr) << 10, json.loads(done.stdout)


def check(requests: Sequence[Made], coverage: dict[str, Any], kept_lines: set[int]) -> dict[str, Any]:
    """Holds the report against what was put in; raises AssertionError where it is wrong, returns what MinHash estimated."""
    put_in = Counter(made.reason for made in requests)
    dropped = coverage["dropped"]
    for reason in ("empty", "too long", "exact duplicate"):
        assert dropped[reason] == put_in[reason], (reason, dropped[reason], put_in[reason])
    assert coverage["requests"]["read"] == len(requests)
    assert coverage["requests"]["kept"] == len(kept_lines) == len(requests) - sum(dropped.values())
    (label_rows,) = coverage["labels"].values()
    assert {row["value"]: row["read"] for row in label_rows} == Counter(" ".join(made.label.split()) for made in requests)
    for row in coverage["length"]["histogram"]:
        assert row["read"] == sum(row["from"] <= len(made.text) <= row["to"] for made in requests), row
    characters = Counter("".join(made.text for made in requests))
    assert (coverage["tokens"]["distinct"], coverage["tokens"]["occurrences"]) == (len(characters), characters.total())

    lost = sum(not made.reason and line not in kept_lines for line, made in enumerate(requests, 1))
    missed = sum(made.reason == "near duplicate" and line in kept_lines for line, made in enumerate(requests, 1))
    assert dropped["near duplicate"] == put_in["near duplicate"] - missed + lost
    return {
        "near_duplicates_put_in": put_in["near duplicate"], "near_duplicates_dropped": put_in["near duplicate"] - missed,
        "distinct_put_in": put_in[""], "distinct_dropped_as_near_duplicates": lost,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("requests", type=Path, nargs="?", default=REQUESTS, help="JSON Lines with a question and a class")
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokenizer", type=Path, help="select by tokens of this tokenizer, too")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    if not arguments.requests.is_file():
        parser.error(f"{arguments.requests} is missing: give a JSON Lines file of requests with the fields question and class")

    lines = [json.loads(line) for line in arguments.requests.read_text(encoding="utf-8").splitlines()]
    requests = make([(line["question"], line["class"]) for line in lines], arguments.count)
    with tempfile.TemporaryDirectory() as folder:
        file, output = Path(folder) / "requests.jsonl", Path(folder) / "set"
        with file.open("w", encoding="utf-8") as stream:
            for made in requests:
                stream.write(json.dumps({"question": made.text, "class": made.label}, ensure_ascii=False) + "\n")
        basic = [str(file), "-o", str(output), "--label", "class"]
        runs = {"characters": basic, "characters, redacted": [*basic, "--redact"]}
        if arguments.tokenizer:
            runs[f"tokens of {arguments.tokenizer.name}"] = [*basic, "--tokenizer", str(arguments.tokenizer)]
        results: dict[str, Any] = {}
        for name, command in runs.items():
            rounds = [timed(command) for _ in range(arguments.rounds)]
            digests = {found["digest"] for _, _, found in rounds}
            assert len(digests) == 1, "the same file gave different sets"
            results[name] = {
                "seconds": [round(seconds, 2) for seconds, _, _ in rounds],
                "median_seconds": round(statistics.median(seconds for seconds, _, _ in rounds), 2),
                "peak_mb": round(max(peak for _, peak, _ in rounds) / 1e6, 1),
            }
        _, _, everything = timed([*basic, "--size", str(arguments.count), "--holdout", "0"])
        kept = {
            json.loads(line)["line"] for line in (output / "calibration.jsonl").read_text(encoding="utf-8").split("\n") if line
        }
        estimated = check(requests, everything["coverage"], kept)
        report = {
            "requests": len(requests),
            "made_from": f"{len(lines)} of {arguments.requests.name}",
            "bytes": file.stat().st_size,
            "put_in": dict(sorted(Counter(made.reason or "distinct" for made in requests).items())),
            "allowed": {"seconds": MOST_SECONDS, "peak_mb": MOST_BYTES / 1e6},
            "selections": results,
            "report": {"exact counts": "as put in", **estimated},
            "machine": machine.describe(),
        }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps({name: report[name] for name in ("put_in", "selections", "report")}, indent=2))
    slow = [name for name, run in results.items() if run["median_seconds"] > MOST_SECONDS or run["peak_mb"] > MOST_BYTES / 1e6]
    few = estimated["near_duplicates_dropped"] < 0.995 * estimated["near_duplicates_put_in"]
    if slow or few or estimated["distinct_dropped_as_near_duplicates"]:
        raise SystemExit(f"not as it should be: {', '.join(slow) or 'duplicates'}")


if __name__ == "__main__":
    main()
