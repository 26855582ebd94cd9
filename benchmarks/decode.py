"""Decoding speed of an engine against the memory's read bandwidth, measured in turns in one run.

    python -m benchmarks.decode build/engines/llama-1b [--out benchmarks/results/decode-llama-1b.json]

A round is: read 1.5 GiB of memory, decode, read again. The roofline fraction of a round is the weight bytes a token
must read, times tokens per second, over the better of the two readings. Weights larger than the last-level cache only.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.bandwidth import ReadBandwidth
from runtime import Engine, SamplingParams
from runtime.program import read_program

PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 32, 64, 7


def weight_bytes(engine_dir: Path) -> int:
    """Bytes of weights one decoding step reads: every linear layer once, no embedding table."""
    return sum(call.bytes for call in read_program(engine_dir / "rank0").calls)


def measure(engine_dir: Path, rounds: int, threads: int | None) -> dict[str, Any]:
    """Decode and read memory in turns."""
    needed = weight_bytes(engine_dir)
    samples = []
    with Engine.load(engine_dir, threads=threads) as engine:
        memory = ReadBandwidth(threads or machine.describe()["cores"])
        prompt = [5 + i * 7 % 250 for i in range(PROMPT_TOKENS)]
        params = SamplingParams(temperature=0, repetition_penalty=1.0, max_new_tokens=NEW_TOKENS + 1, ignore_eos=True)
        engine.generate([prompt], params)
        before = memory.measure()
        for _ in range(rounds):
            (result,) = engine.generate([prompt], params)
            after = memory.measure()
            rate = result.timings.tokens_per_second
            bandwidth = max(before, after)
            samples.append({"tokens_per_second": round(rate, 2), "read_gb_per_second": round(bandwidth, 2),
                            "roofline_fraction": round(rate * needed / 1e9 / bandwidth, 4)})  # fmt: skip
            before = after
        isa, load_s = getattr(engine.executor, "isa", None), engine.load_s

    def median(key: str) -> float:
        return statistics.median(sample[key] for sample in samples)

    return {
        "engine": engine_dir.name,
        "isa": isa,
        "load_s": round(load_s, 3),
        "weight_bytes_per_token": needed,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "median": {key: median(key) for key in samples[0]},
        "samples": samples,
        "machine": machine.describe(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    report = measure(arguments.engine, arguments.rounds, arguments.threads)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report | {"machine": report["machine"]["processor"]}, indent=2))


if __name__ == "__main__":
    main()
