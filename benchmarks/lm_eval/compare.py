"""One checkpoint under the harness: float32 weights in Transformers by the harness' own model class, and engines by ours.

    pip install -c constraints.txt -e '.[build,eval]' 'lm_eval[hf]'
    belle-compile build build/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --quant none -o build/engines/smollm2-none
    python -m benchmarks.lm_eval.compare build/engines/smollm2-none build/engines/smollm2-int8

An engine of float32 weights must agree with Transformers in all that the harness sees; what an INT8 engine differs by is the
quantization's cost. `--max-length` is below the length of the longest texts, so that rolling windows are compared too.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import tokenizers
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedTokenizerFast

from belle_compile.runtime import Engine
from belle_compile.runtime.artifact import read_manifest
from benchmarks import machine
from benchmarks.accuracy import RESULTS
from benchmarks.fetch_smollm2 import fetch
from benchmarks.lm_eval.model import BelleLM
from benchmarks.lm_eval.scores import agreement, evaluate, metrics
from benchmarks.simulation import load_fp32

REFERENCE = "transformers float32"


def reference(gguf: Path, engine: Path, max_length: int) -> Any:
    """The harness' Transformers model of the checkpoint, with the engine's tokenizer."""
    special = read_manifest(engine).special_tokens
    file = engine / "tokenizer.json"
    name = tokenizers.Tokenizer.from_file(str(file)).id_to_token
    assert special.bos is not None, "the comparison's model has BOS"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(file), bos_token=name(special.bos), eos_token=name(special.eos[0]), pad_token=name(special.eos[0])
    )
    return HFLM(pretrained=load_fp32(gguf), tokenizer=tokenizer, max_length=max_length, device="cpu", batch_size=8)


def cache_of(arguments: argparse.Namespace, name: str) -> Path | None:
    """The harness' cache of a model's answers."""
    return arguments.cache / name.replace(" ", "-") if arguments.cache else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", type=Path, nargs="+", metavar="ENGINE", help="engines of SmolLM2-135M")
    parser.add_argument("--tasks", nargs="+", default=["python_docs"])
    parser.add_argument("--limit", type=int, help="items of each task; all by default")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep the models' answers, so that a later run goes on")
    parser.add_argument("--out", type=Path, default=RESULTS / "lm-eval.json")
    arguments = parser.parse_args()
    gguf = fetch(Path("build/smollm2"))

    found = {
        REFERENCE: evaluate(
            reference(gguf, arguments.engines[0], arguments.max_length),
            arguments.tasks,
            arguments.limit,
            cache_of(arguments, REFERENCE),
        )
    }
    engines = {}
    for directory in arguments.engines:
        with Engine.load(directory) as engine:
            model = BelleLM(engine, max_length=arguments.max_length)
            found[directory.name] = evaluate(model, arguments.tasks, arguments.limit, cache_of(arguments, directory.name))
            engines[directory.name] = model.get_model_info()["quantization"]
    samples = {name: results["samples"] for name, results in found.items()}
    report = {
        "model": gguf.name,
        "tasks": {task: len(items) for task, items in sorted(samples[REFERENCE].items())},
        "max_length": arguments.max_length,
        "engines": engines,
        "results": {name: metrics(results) for name, results in found.items()},
        f"against {REFERENCE}": {
            name: {task: agreement(items, samples[name][task]) for task, items in sorted(samples[REFERENCE].items())}
            for name in engines
        },
        "machine": machine.describe(),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps({key: report[key] for key in report if key.startswith(("results", "against"))}, indent=2))


if __name__ == "__main__":
    main()
