"""Decoding with prompt lookup against decoding without it, in turns, on requests whose answers quote.

    python -m benchmarks.prompt_lookup artifacts/smollm2-135m-cpu requests.jsonl [--out benchmarks/results/prompt-lookup.json]

The requests are JSON lines with `question` and `class`. Each is answered both ways, one right after the other, every round
beginning with the other way. Rates are of decoding alone, tokens after the first per second; prefill is the same both ways.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from belle_compile.runtime import Engine, Result, SamplingParams
from benchmarks import machine

CLASSES = ("extract", "summarization")
DRAFTS, REQUESTS, NEW_TOKENS, ROUNDS = 8, 12, 160, 3


def read_requests(path: Path, classes: Iterable[str], most: int) -> list[tuple[str, str]]:
    """(class, question) of up to `most` requests of each class, in the order of the file."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    found = []
    for name in classes:
        questions = [record["question"] for record in records if record["class"] == name][:most]
        if not questions:
            there = ", ".join(sorted({record["class"] for record in records}))
            raise SystemExit(f"{path} has no request of class {name}; its classes are {there}.")
        found += [(name, question) for question in questions]
    return found


def measure(engine: Engine, requests: list[tuple[str, str]], params: SamplingParams, rounds: int) -> list[dict[str, Any]]:
    """One sample a request and round; the first request is answered once before."""
    plain = replace(params, prompt_lookup=0)
    engine.generate([requests[0][1]], plain)
    samples = []
    for index, (name, question) in enumerate(requests):
        for turn in range(rounds):
            results: dict[bool, Result] = {}
            for looks in (turn % 2 == 0, turn % 2 == 1):
                (results[looks],) = engine.generate([question], params if looks else plain)
            samples.append({"request": index, "class": name, "round": turn, **_sample(results[False], results[True])})
    return samples


def _sample(plain: Result, lookup: Result) -> dict[str, Any]:
    return {
        "prompt_tokens": len(plain.prompt_token_ids),
        "plain_tokens": len(plain.token_ids),
        "lookup_tokens": len(lookup.token_ids),
        "plain_decode_s": round(plain.timings.decode_s, 5),
        "lookup_decode_s": round(lookup.timings.decode_s, 5),
        "drafted": lookup.drafted,
        "accepted": lookup.accepted,
        "identical": plain.token_ids == lookup.token_ids,
    }


def summarize(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Rates over all tokens, and the median over samples of the ratio of the two rates."""

    def total(key: str) -> float:
        return float(sum(sample[key] for sample in samples))

    def rate(sample: dict[str, Any], way: str) -> float:
        return float((sample[f"{way}_tokens"] - 1) / sample[f"{way}_decode_s"])

    long_enough = [sample for sample in samples if min(sample["plain_tokens"], sample["lookup_tokens"]) > 1]
    ratios = [rate(sample, "lookup") / rate(sample, "plain") for sample in long_enough] or [1.0]
    after_first = {way: total(f"{way}_tokens") - len(samples) for way in ("plain", "lookup")}
    rates = {way: after_first[way] / (total(f"{way}_decode_s") or 1.0) for way in after_first}
    return {
        "samples": len(samples),
        "identical": int(total("identical")),
        "plain_tokens_per_second": round(rates["plain"], 2),
        "lookup_tokens_per_second": round(rates["lookup"], 2),
        "ratio": round(rates["lookup"] / (rates["plain"] or 1.0), 3),
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_lowest": round(min(ratios), 3),
        "ratio_highest": round(max(ratios), 3),
        "drafted": int(total("drafted")),
        "accepted": int(total("accepted")),
        "acceptance": round(total("accepted") / (total("drafted") or 1.0), 3),
        "tokens_per_step": round(after_first["lookup"] / (after_first["lookup"] - total("accepted") or 1.0), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("data", type=Path, help="JSON lines with question and class")
    parser.add_argument("--class", dest="classes", action="append", help=f"may be given several times (default: {CLASSES})")
    parser.add_argument("--drafts", type=int, default=DRAFTS)
    parser.add_argument("--requests", type=int, default=REQUESTS, help="of each class")
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--repetition-penalty", type=float, default=1.0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    params = SamplingParams(
        temperature=arguments.temperature, repetition_penalty=arguments.repetition_penalty, seed=1,
        max_new_tokens=arguments.new_tokens, prompt_lookup=arguments.drafts,
    )  # fmt: skip
    classes = arguments.classes or list(CLASSES)
    requests = read_requests(arguments.data, classes, arguments.requests)
    with Engine.load(arguments.engine, threads=arguments.threads, prefix_cache=False) as engine:
        isa = getattr(engine.executor, "isa", None)
        samples = measure(engine, requests, params, arguments.rounds)
    groups = {name: summarize([sample for sample in samples if sample["class"] == name]) for name in classes}
    for name, group in {**groups, "all": summarize(samples)}.items():
        print(f"{name}: {group['plain_tokens_per_second']} -> {group['lookup_tokens_per_second']} tokens/s, {group['ratio']}x "
              f"(median {group['ratio_median']}x, {group['ratio_lowest']} to {group['ratio_highest']}); "
              f"{group['accepted']} of {group['drafted']} drafts accepted ({group['acceptance']:.0%}), "
              f"{group['tokens_per_step']} tokens a step; {group['identical']} of {group['samples']} identical")  # fmt: skip
    report = {
        "engine": arguments.engine.name,
        "isa": isa,
        "data": arguments.data.name,
        "drafts": arguments.drafts,
        "new_tokens": arguments.new_tokens,
        "temperature": arguments.temperature,
        "repetition_penalty": arguments.repetition_penalty,
        "classes": groups,
        "all": summarize(samples),
        "samples": samples,
        "machine": machine.describe(),
    }
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
