"""What adapters at run time cost: a batch of 8 requests with 4 adapters, and the same batch without any, in turns.

    belle-compile build CHECKPOINT --lora-rank 8 -o ENGINE
    python -m benchmarks.lora ENGINE [--rank 8] [--targets q_proj,v_proj] [--out benchmarks/results/lora.json]

The adapters have random values; the engine takes them from directories in the form of PEFT, made for its linears. The speed is
that of the tokens after the first one: all answers then run in the same steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from belle_compile.runtime import Engine, SamplingParams
from belle_compile.runtime.adapters.basis import EngineBasis
from benchmarks import machine

REQUESTS, ADAPTERS, PROMPT, TOKENS, ROUNDS = 8, 4, 32, 128, 7
PARAMS = SamplingParams(temperature=0, repetition_penalty=1.0, max_new_tokens=TOKENS, ignore_eos=True)


def make_adapter(directory: Path, basis: EngineBasis, rank: int, targets: list[str], seed: int) -> Path:
    """Write an adapter of random values for the linears whose names end with one of the targets (none: all of them)."""
    random, tensors = np.random.default_rng(seed), {}
    names = [name for name in basis.linears if not targets or name.rpartition(".")[2] in targets]
    for name in names:
        linear = basis.linears[name]
        for part, shape in (("lora_A", (rank, linear.inputs)), ("lora_B", (linear.outputs, rank))):
            values = random.standard_normal(shape) * 0.1 / shape[1] ** 0.5
            tensors[f"base_model.model.{name}.{part}.weight"] = values.astype(np.float32)
    directory.mkdir(parents=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    modules = sorted({name.rpartition(".")[2] for name in names})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "target_modules": modules}
    (directory / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def tokens_per_second(engine: Engine, adapters: list[str | None], seed: int) -> float:
    """The speed of one batch of prompts that were never seen, in tokens a second of all its answers."""
    random = np.random.default_rng(seed)
    prompts = random.integers(5, engine.executor.vocab_size, (REQUESTS, PROMPT)).tolist()
    params = [replace(PARAMS, adapter=name) for name in adapters]
    results = engine.generate(prompts, params)
    return REQUESTS * (TOKENS - 1) / max(result.timings.decode_s for result in results)


def measure(engine: Engine, names: list[str]) -> dict[str, Any]:
    """Speeds with and without adapters; the ratio is the median of those of pairs of neighbouring runs."""
    mixed: list[str | None] = [names[i % len(names)] for i in range(REQUESTS)]
    alone: list[str | None] = [None] * REQUESTS
    without: list[float] = []
    with_adapters: list[float] = []
    for number in range(-1, ROUNDS):  # the first round is not counted
        pair = [tokens_per_second(engine, adapters, 2 * number + 7) for adapters in (alone, mixed)]
        if number >= 0:
            without.append(pair[0])
            with_adapters.append(pair[1])
    ratios = [mine / base for mine, base in zip(with_adapters, without, strict=True)]
    return {
        "without_tokens_per_s": round(statistics.median(without), 1),
        "with_tokens_per_s": round(statistics.median(with_adapters), 1),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--targets", default="", help="names of linear layers with commas between them; all by default")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    targets = [name for name in options.targets.split(",") if name]
    with tempfile.TemporaryDirectory(prefix="belle-lora-") as folder:
        basis = EngineBasis.read(options.engine)
        made = {f"adapter{i}": make_adapter(Path(folder) / str(i), basis, options.rank, targets, i) for i in range(ADAPTERS)}
        with Engine.load(options.engine, lora=made) as engine:
            row = measure(engine, [*made])
    facts = {"engine": options.engine.name, "requests": REQUESTS, "adapters": ADAPTERS, "rank": options.rank,
             "targets": targets or "all", "prompt_tokens": PROMPT, "tokens": TOKENS}  # fmt: skip
    print(json.dumps(facts | row))
    if options.out:
        options.out.write_text(json.dumps({"machine": machine.describe(), **facts, **row}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
