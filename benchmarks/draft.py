"""Decoding with a draft engine against decoding without it, in turns.

    python -m benchmarks.draft ENGINE DRAFT requests.jsonl [--draft-tokens 4] [--out benchmarks/results/draft.json]

The requests are JSON lines with `question`. Both ways are loaded at the same time; batches of requests are answered by one and
then by the other, every round beginning with the other way. Rates are of whole batches, all tokens of answers per second.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from belle_compile.runtime import Engine, SamplingParams
from benchmarks import machine

REQUESTS, NEW_TOKENS, ROUNDS, BATCHES = 16, 128, 3, (1, 4, 16)
WAYS: dict[str, dict[str, Any]] = {"greedy": {"temperature": 0.0}, "seeded": {"temperature": 0.7, "top_p": 0.9}}


def measure(engines: dict[str, Engine], prompts: list[str], way: str, batch: int, rounds: int, tokens: int) -> dict[str, Any]:
    """Rates of both engines in batches of this size, and how many answers are identical."""
    rates: dict[str, list[float]] = {name: [] for name in engines}
    drafted = accepted = identical = answers = 0
    for turn in range(rounds):
        found: dict[str, list[list[int]]] = {}
        for name in list(engines)[:: 1 if turn % 2 else -1]:
            found[name], generated, seconds = [], 0, 0.0
            for first in range(0, len(prompts), batch):
                part = prompts[first : first + batch]
                params = [
                    SamplingParams(**WAYS[way], repetition_penalty=1.0, seed=first + n, max_new_tokens=tokens)
                    for n in range(len(part))
                ]
                started = time.perf_counter()
                results = engines[name].generate(part, params)
                seconds += time.perf_counter() - started
                generated += sum(len(result.token_ids) for result in results)
                found[name] += [result.token_ids for result in results]
                drafted += sum(result.drafted for result in results)
                accepted += sum(result.accepted for result in results)
            rates[name].append(round(generated / seconds, 2))
        identical += sum(one == other for one, other in zip(found["plain"], found["draft"], strict=True))
        answers += len(prompts)
    medians = {name: statistics.median(samples) for name, samples in rates.items()}
    return {
        "way": way, "batch": batch, "tokens_per_second": rates, "ratio": round(medians["draft"] / medians["plain"], 3),
        "drafted": drafted, "accepted": accepted, "acceptance": round(accepted / (drafted or 1), 3),
        "answers": answers, "identical": identical,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("draft", type=Path)
    parser.add_argument("data", type=Path, help="JSON lines with question")
    parser.add_argument("--draft-tokens", type=int, help="guess always so many (default: as many as pay)")
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--batch", type=int, action="append", help=f"may be given several times (default: {BATCHES})")
    parser.add_argument("--prefix-cache", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--kv-tokens", type=int, default=32768, help="of each of the three caches")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    lines = arguments.data.read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["question"] for line in lines if line.strip()][: arguments.requests]
    options: dict[str, Any] = {
        "threads": arguments.threads, "prefix_cache": arguments.prefix_cache, "kv_tokens": arguments.kv_tokens,
    }  # fmt: skip
    drafting = {"draft": arguments.draft, "draft_tokens": arguments.draft_tokens}
    rows = []
    with Engine.load(arguments.engine, **options) as plain, Engine.load(arguments.engine, **options, **drafting) as both:
        engines = {"plain": plain, "draft": both}
        for engine in engines.values():  # prepares kernels
            engine.generate(prompts[:1], SamplingParams(temperature=0, max_new_tokens=16))
        for way in WAYS:
            for batch in arguments.batch or BATCHES:
                sizes = (arguments.rounds, arguments.new_tokens)
                rows.append(row := measure(engines, prompts, way, batch, *sizes))
                print(f"{way}, batch {batch}: {row['ratio']}x; {row['accepted']} of {row['drafted']} guesses accepted; "
                      f"{row['identical']} of {row['answers']} answers identical")  # fmt: skip
    report = {
        "engine": arguments.engine.name, "draft": arguments.draft.name, "data": arguments.data.name,
        "draft_tokens": arguments.draft_tokens, "new_tokens": arguments.new_tokens, "prefix_cache": arguments.prefix_cache,
        "rows": rows, "machine": machine.describe(),
    }  # fmt: skip
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
