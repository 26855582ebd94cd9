"""A fresh process from nothing to its first token, and the memory it took: prints one JSON object.

python -m benchmarks.first_token build/engines/llama-1b --isa avx2 --threads 2
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

PROMPT, NEW = 32, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--isa")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()

    started = time.perf_counter()
    from belle_compile.runtime import Engine, SamplingParams

    imported = time.perf_counter()
    with Engine.load(arguments.engine, isa=arguments.isa, threads=arguments.threads) as engine:
        params = SamplingParams(temperature=0, repetition_penalty=1.0, max_new_tokens=NEW, ignore_eos=True)
        with engine.stream([5 + i % 200 for i in range(PROMPT)], params) as stream:
            pieces = list(stream)
        first = engine.load_s + stream.result.timings.first_token_s
        kept = {key: _status(key) for key in ("VmHWM", "RssAnon", "RssFile")}
        load_s = engine.load_s
    assert len(pieces) <= NEW
    print(json.dumps({
        "import_s": round(imported - started, 4), "load_s": round(load_s, 4), "load_to_first_token_s": round(first, 4),
        "peak_mb": round(kept["VmHWM"], 1), "anonymous_mb": round(kept["RssAnon"], 1), "mapped_mb": round(kept["RssFile"], 1),
    }))  # fmt: skip


def _status(key: str) -> float:
    """A size of /proc/self/status in 10^6 bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    main()
