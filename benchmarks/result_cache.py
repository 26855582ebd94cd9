"""What the result cache gives: a Zipf trace over real questions, and the time of a hit over HTTP.

    python -m benchmarks.result_cache ENGINE requests.jsonl [--out benchmarks/results/result-cache.json]

The questions (JSON lines with `question`) are asked in the frequencies of Zipf's law, one after the other, of a server whose
cache holds a part of the answers. Its hits are compared with those of an ideal LRU cache of the same size in bytes. The times
are those of an HTTP client on the same host that keeps its connection.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from belle_compile.runtime.serving.result_cache.entry import Entry
from belle_compile.runtime.serving.result_cache.memory import ENTRY_OVERHEAD
from benchmarks import machine
from benchmarks.invariance.requests import read_questions
from benchmarks.servers import Server

REQUESTS, EXPONENT, ANSWER, CACHE_BYTES = 3000, 0.9, 16, 96 << 10


class Sample(NamedTuple):
    """The question asked, whether it was a hit, the seconds that it took, and the tokens of the answer."""

    question: int
    hit: bool
    seconds: float
    tokens: int


def trace(questions: int, requests: int, exponent: float) -> list[int]:
    """Return numbers of questions: question k is asked in proportion to 1 / (k + 1) ** exponent."""
    weights = 1.0 / np.arange(1, questions + 1) ** exponent
    numbers: list[int] = np.random.default_rng(0).choice(questions, requests, p=weights / weights.sum()).tolist()
    return numbers


def ideal_hits(numbers: Sequence[int], sizes: dict[int, int], capacity: int) -> list[bool]:
    """Return which requests an LRU cache of `capacity` bytes would answer, given the size of each question's entry."""
    entries: OrderedDict[int, int] = OrderedDict()
    used, hits = 0, []
    for number in numbers:
        hits.append(number in entries)
        if hits[-1]:
            entries.move_to_end(number)
            continue
        entries[number] = sizes[number]
        used += sizes[number]
        while used > capacity:
            used -= entries.popitem(last=False)[1]
    return hits


def entry_bytes(tokens: int) -> int:
    """Return the bytes that an answer of `tokens` tokens takes in the memory store."""
    key = "0" * 64
    return len(key) + len(Entry((0,) * tokens, "length").encode(key)) + ENTRY_OVERHEAD


def ask(server: Server, questions: Sequence[str], numbers: Sequence[int]) -> list[Sample]:
    """Ask one question after the other."""
    connection, samples = http.client.HTTPConnection(server.host, server.port, timeout=300), []
    for number in numbers:
        body = {"model": server.model, "messages": [{"role": "user", "content": questions[number]}]}
        content = json.dumps(body | {"temperature": 0, "max_tokens": ANSWER}).encode()
        started = time.perf_counter()
        connection.request("POST", "/v1/chat/completions", content, {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = response.read()
        seconds = time.perf_counter() - started
        if response.status != 200:
            raise SystemExit(f"question {number}: {answer.decode()}")
        tokens = json.loads(answer)["usage"]["completion_tokens"]
        samples.append(Sample(number, response.headers["X-Result-Cache"] == "hit", seconds, tokens))
    return samples


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("requests", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    questions = read_questions(options.requests)
    numbers = trace(len(questions), REQUESTS, EXPONENT)
    with Server(options.engine, "--result-cache", "memory", "--result-cache-bytes", str(CACHE_BYTES)) as server:
        samples = ask(server, questions, numbers)
    row = summarize(samples)
    print(json.dumps(row))
    if options.out:
        facts = {"requests": REQUESTS, "questions": len(questions), "exponent": EXPONENT, "answer_tokens": ANSWER}
        result = {"machine": machine.describe(), "engine": options.engine.name, **facts, "cache_bytes": CACHE_BYTES, **row}
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def summarize(samples: Sequence[Sample]) -> dict[str, Any]:
    """Return the share of hits and the median times of hits and misses."""
    hits = [sample.seconds for sample in samples if sample.hit]
    misses = [sample.seconds for sample in samples if not sample.hit]
    sizes = {sample.question: entry_bytes(sample.tokens) for sample in samples}
    ideal = ideal_hits([sample.question for sample in samples], sizes, CACHE_BYTES)
    return {
        "hits": len(hits),
        "ideal_lru_hits": sum(ideal),
        "same_hits_as_ideal": ideal == [sample.hit for sample in samples],
        "hit_ratio": round(len(hits) / len(samples), 4),
        "hit_p50_ms": round(1000 * statistics.median(hits), 3),
        "hit_p99_ms": round(1000 * float(np.percentile(hits, 99)), 3),
        "miss_p50_ms": round(1000 * statistics.median(misses), 2),
    }


if __name__ == "__main__":
    main()
