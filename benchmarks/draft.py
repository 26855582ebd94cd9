"""Decoding with a draft engine against decoding without it: whether the answers are the same, and the rates of both, in turns.

    python -m benchmarks.draft ENGINE DRAFT requests.jsonl --out benchmarks/results/draft.json
    python -m benchmarks.draft ENGINE DRAFT requests.jsonl --compare --requests 300 --draft-tokens 4 --out …

The requests are JSON lines with `question`. Both ways are loaded at the same time. For rates, batches of requests are answered
by one and then by the other, in turns, every round beginning with the other way: all tokens of answers per second, prompts
included. With `--compare`, every request is answered once alone without the draft, and with it alone and in batches; no rates.
One run measures some ways and batch sizes, so that it can be short. It replaces an equal one in the file, or is added to it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from belle_compile.runtime import Engine, Result, SamplingParams
from benchmarks import machine

REQUESTS, NEW_TOKENS, ROUNDS, BATCHES = 16, 128, 5, (1, 4, 16)
WAYS: dict[str, dict[str, Any]] = {"greedy": {"temperature": 0.0}, "seeded": {"temperature": 0.7, "top_p": 0.9}}
SETTINGS = ("engine", "draft", "data", "draft_tokens", "new_tokens", "prefix_cache", "threads", "requests", "rounds", "note")


class Requests:
    """Prompts with their parameters, answered in one of `WAYS`; the seed of a request is its number."""

    def __init__(self, prompts: list[str], way: str, tokens: int) -> None:
        self._prompts = prompts
        self._params = [
            SamplingParams(**WAYS[way], repetition_penalty=1.0, seed=number, max_new_tokens=tokens)
            for number in range(len(prompts))
        ]

    def batches(self, size: int) -> Iterable[tuple[list[str], list[SamplingParams]]]:
        for first in range(0, len(self._prompts), size):
            yield self._prompts[first : first + size], self._params[first : first + size]

    def answers(self, engine: Engine, batch: int) -> list[Result]:
        return [result for part in self.batches(batch) for result in engine.generate(*part)]


def rates(plain: Engine, both: Engine, requests: Requests, batch: int, rounds: int) -> dict[str, Any]:
    """Tokens a second of each round without and with the draft, in batches of this size; the quartiles of their ratio, of each
    batch with and without it, one right after the other; and how many answers are identical."""
    engines = {"plain": plain, "draft": both}
    samples: dict[str, list[float]] = {name: [] for name in engines}
    guessed: list[Result] = []
    pairs, same = [], 0
    for turn in range(rounds):
        tokens, seconds = dict.fromkeys(engines, 0), dict.fromkeys(engines, 0.0)
        for number, part in enumerate(requests.batches(batch)):
            results: dict[str, list[Result]] = {}
            taken: dict[str, float] = {}
            for name in list(engines)[:: 1 if (turn + number) % 2 else -1]:
                started = time.perf_counter()
                results[name] = engines[name].generate(*part)
                taken[name] = time.perf_counter() - started
                seconds[name] += taken[name]
                tokens[name] += sum(len(result.token_ids) for result in results[name])
            pairs.append(taken["plain"] / taken["draft"])
            guessed += results["draft"]
            same += identical(results["plain"], results["draft"])
        for name in engines:
            samples[name].append(round(tokens[name] / seconds[name], 2))
    medians = {name: statistics.median(found) for name, found in samples.items()}
    ratio = {
        "tokens_per_second": samples, "ratio_of_medians": round(medians["draft"] / medians["plain"], 3), "pairs": len(pairs),
        "ratio": [round(quartile, 3) for quartile in statistics.quantiles(pairs, n=4)],
    }  # fmt: skip
    return ratio | guesses(guessed) | {"answers": len(guessed), "identical": same}


def identical(expected: list[Result], found: list[Result]) -> int:
    return sum(one.token_ids == other.token_ids for one, other in zip(expected, found, strict=True))


def guesses(results: list[Result]) -> dict[str, Any]:
    """What was guessed for answers, and what of it was right."""
    drafted, accepted = (sum(getattr(result, name) for result in results) for name in ("drafted", "accepted"))
    tokens = sum(len(result.token_ids) for result in results)
    acceptance = round(accepted / drafted, 3) if drafted else None
    return {"tokens": tokens, "drafted": drafted, "accepted": accepted, "acceptance": acceptance}


def compare(plain: list[Result], both: Engine, requests: Requests, batch: int) -> dict[str, Any]:
    """How many answers in batches of this size with the draft are those alone without it."""
    found = requests.answers(both, batch)
    return guesses(found) | {"answers": len(found), "identical": identical(plain, found)}


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    lines = arguments.data.read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["question"] for line in lines if line.strip()][: arguments.requests]
    options: dict[str, Any] = {
        "threads": arguments.threads, "prefix_cache": arguments.prefix_cache, "kv_tokens": arguments.kv_tokens,
    }  # fmt: skip
    drafting = {"draft": arguments.draft, "draft_tokens": arguments.draft_tokens}
    rows = []
    with Engine.load(arguments.engine, **options) as plain, Engine.load(arguments.engine, **options, **drafting) as both:
        for engine in (plain, both):  # prepares kernels
            engine.generate(prompts[:1], SamplingParams(temperature=0, max_new_tokens=16))
        for way in arguments.way or WAYS:
            requests = Requests(prompts, way, arguments.new_tokens)
            expected = requests.answers(plain, 1) if arguments.compare else []
            for batch in arguments.batch or BATCHES:
                if arguments.compare:
                    row = compare(expected, both, requests, batch)
                else:
                    row = rates(plain, both, requests, batch, arguments.rounds)
                rows.append({"way": way, "batch": batch} | row)
                speed = f"{row['ratio'][1]}x {row['ratio']} (medians: {row['ratio_of_medians']}x); " if "ratio" in row else ""
                print(f"{way}, batch {batch}: {speed}{row['accepted']} of {row['drafted']} guesses accepted; "
                      f"{row['identical']} of {row['answers']} answers identical", flush=True)  # fmt: skip
    return rows


def add(out: Path, settings: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Add a run to a file of results, in place of what was measured before with the same settings, way and batch size."""
    key = ("way", "batch")
    runs = json.loads(out.read_text()) if out.exists() else []
    new = {tuple(row[name] for name in key) for row in rows}
    for other in runs:
        if {name: other[name] for name in settings} == settings:
            other["rows"] = [row for row in other["rows"] if tuple(row[name] for name in key) not in new]
    runs = [other for other in runs if other["rows"]] + [settings | {"rows": rows, "machine": machine.describe()}]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(runs, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("draft", type=Path)
    parser.add_argument("data", type=Path, help="JSON lines with question")
    parser.add_argument("--compare", action="store_true", help="compare answers, and measure no rates")
    parser.add_argument("--draft-tokens", type=int, help="guess always so many (default: as many as pay)")
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--way", choices=WAYS, action="append", help="may be given several times (default: all)")
    parser.add_argument("--batch", type=int, action="append", help=f"may be given several times (default: {BATCHES})")
    parser.add_argument("--prefix-cache", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--kv-tokens", type=int, default=32768, help="of each of the three caches")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--note", default="", help="what ran beside it")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = run(arguments)
    settings = {name: getattr(arguments, name) for name in SETTINGS}
    settings |= {name: getattr(arguments, name).name for name in ("engine", "draft", "data")}
    if arguments.compare:
        settings["rounds"] = 0
    if arguments.out:
        add(arguments.out, settings, rows)


if __name__ == "__main__":
    main()
