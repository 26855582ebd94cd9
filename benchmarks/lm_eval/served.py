"""One engine under the harness twice: in this process, and served over HTTP to the harness' own model class for OpenAI's API.

    pip install -c constraints.txt -e '.[eval,serve]' 'lm_eval[api]'
    python -m benchmarks.lm_eval.served build/engines/smollm2-int8

Scores must be the same. `local-completions` of the harness asks for log probabilities with `echo`, and encodes texts with the
server's own `/tokenize`. It leaves the repetition penalty open, for which the server has the engine's default while our model
class has none, so both are told that there is none. `--max-length` is below the length of the longest texts, so that rolling
windows are compared too.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from lm_eval.models.openai_completions import LocalCompletionsAPI

from belle_compile.runtime import Engine
from benchmarks import machine
from benchmarks.accuracy import RESULTS
from benchmarks.lm_eval.model import BelleLM
from benchmarks.lm_eval.scores import agreement, evaluate, metrics
from benchmarks.servers import Server

NEUTRAL = {"repetition_penalty": 1.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path, metavar="ENGINE")
    parser.add_argument("--tasks", nargs="+", default=["python_docs"])
    parser.add_argument("--limit", type=int, help="items of each task; all by default")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--concurrent", type=int, default=4, help="requests at the same time")
    parser.add_argument("--out", type=Path, default=RESULTS / "lm-eval-served.json")
    arguments = parser.parse_args()

    with Engine.load(arguments.engine) as engine:
        model = BelleLM(engine, max_length=arguments.max_length)
        inside, facts = evaluate(model, arguments.tasks, arguments.limit, gen_kwargs=NEUTRAL), model.get_model_info()
    with Server(arguments.engine, "--result-cache", "none") as server:
        client = LocalCompletionsAPI(
            base_url=f"{server.url}/v1/completions", model=server.model, num_concurrent=arguments.concurrent,
            max_length=arguments.max_length + 2,  # rolling windows are by two tokens shorter
        )  # fmt: skip
        served = evaluate(client, arguments.tasks, arguments.limit, gen_kwargs=NEUTRAL)
    same = metrics(inside) == metrics(served)
    report = {
        "model": facts["model_name"],
        "quantization": facts["quantization"],
        "instruction_set": facts["instruction_set"],
        "tasks": {task: len(items) for task, items in sorted(inside["samples"].items())},
        "max_length": arguments.max_length,
        "same_scores": same,
        "results": {"in process": metrics(inside), "local-completions": metrics(served)},
        "samples": {
            task: agreement(items, served["samples"][task]) for task, items in sorted(inside["samples"].items())
        },
        "machine": machine.describe(),
    }  # fmt: skip
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps({key: report[key] for key in ("same_scores", "results", "samples")}, indent=2))
    sys.exit(not same)


if __name__ == "__main__":
    main()
