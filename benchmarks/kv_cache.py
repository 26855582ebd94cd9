"""What the type of the KV cache costs: engines of one model that differ in it alone, against the first of them.

    belle-compile build MODEL --quant none --kv-cache float32 -o build/engines/kv-float32   # and the other types
    python -m benchmarks.kv_cache build/engines/kv-float32 build/engines/kv-bfloat16 ...

Unquantized weights show the cache's own error. Text as in benchmarks/accuracy.py.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from belle_compile.compiler.accuracy import Comparison
from belle_compile.runtime import Engine
from belle_compile.runtime.artifact import read_manifest
from benchmarks import machine
from benchmarks.accuracy import RESULTS, WINDOW, documentation_windows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", type=Path, nargs="+", metavar="ENGINE")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--out", type=Path, default=RESULTS / "kv-cache.json")
    arguments = parser.parse_args()

    windows: list[list[int]] = []
    reference: list[torch.Tensor] = []
    results: dict[str, dict[str, float]] = {}
    for directory in arguments.engines:
        with Engine.load(directory, kv_tokens=2 * WINDOW) as engine:
            windows = windows or documentation_windows(engine, arguments.windows)
            logits = [torch.from_numpy(np.array(engine.logits(ids))) for ids in windows]
        if not reference:
            reference = logits
            continue
        comparison = Comparison()
        for expected, found, ids in zip(reference, logits, windows, strict=True):
            comparison.add(expected, found, ids)
        results[read_manifest(directory).quantization["kv_cache"]] = comparison.means()
    report = {
        "model": read_manifest(arguments.engines[0]).model.name,
        "text": f"pydoc_data.topics, {len(windows)} windows of {WINDOW} tokens",
        "reference": read_manifest(arguments.engines[0]).quantization,
        "results": results,
        "machine": machine.describe(),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
