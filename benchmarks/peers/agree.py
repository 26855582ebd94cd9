"""Answers of every row against Transformers in float32, on 20 chat prompts to SmolLM2-135M.

    python -m benchmarks.peers.agree [--only belle llama ...]

Greedy: the share of the reference's tokens that come out at the same place, answers that are the same throughout, and how many
tokens pass before the first difference. Teacher-forced, where an adapter offers logits: the same most likely token along the
reference's answers, and the mean KL divergence from the reference in nats; the same over windows of Python's language
documentation, with the ratio of perplexities. Needs engines, as `python -m benchmarks.peers
smollm2-135m --prepare` makes them. Writes results/peers/agreement.json, which the report shows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import tokenizers

from belle_compile.runtime import host
from benchmarks import machine
from benchmarks.engines import SMOLLM2
from benchmarks.peers import report
from benchmarks.peers.convert import Ready, prepare, prepare_all
from benchmarks.peers.home import MODELS, PeersError, last_line, venv_python
from benchmarks.peers.models import tensor_shapes
from benchmarks.peers.rounds import run_worker
from benchmarks.peers.rows import OURS, Row, choose, read_rows
from benchmarks.text import windows

LONGEST, TIMEOUT_S, WINDOWS = 32, 900.0, 20
# Besides the rows of peers.toml: as fast as ours there, so only their answers are compared.
CALIBRATED = tuple(Row(f"belle {preset}, calibrated", OURS, 8, f"{preset}+calibrated") for preset in ("int8", "int8-accurate"))
QUESTIONS = (
    "What is the capital of France?", "Write a short poem about the sea.", "Explain photosynthesis to a child.",
    "List three healthy breakfast ideas.", "How do I boil an egg?", "Who wrote Romeo and Juliet?",
    "What is the difference between a list and a tuple in Python?", "Give me a name for a black cat.",
    "Translate 'good morning' to Spanish.", "Why is the sky blue?", "Summarize the story of Cinderella in two sentences.",
    "What are the primary colors?", "Write a polite email asking for a day off.", "How many days are in a leap year?",
    "Tell me a joke about computers.", "What is gravity?", "Describe a sunny day at the beach.",
    "What should I pack for a camping trip?", "What is machine learning?", "Give three tips for learning a new language.",
)  # fmt: skip
TOKENIZE = """
import json, sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
chats = [[{"role": "user", "content": question}] for question in json.load(sys.stdin)]
print(json.dumps([tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=True)["input_ids"] for c in chats]))
"""


def tokenize(model: Path) -> list[list[int]]:
    """Token ids of the questions in the checkpoint's chat template."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [str(venv_python("hf")), "-c", TOKENIZE, str(model)]
    found = subprocess.run(command, input=json.dumps(QUESTIONS), capture_output=True, text=True, env=environment)
    if found.returncode:
        raise PeersError(f"could not tokenize the questions: {last_line(found.stderr, found.returncode)}")
    ids: list[list[int]] = json.loads(found.stdout.splitlines()[-1])
    return ids


def documentation(model: Path) -> list[list[int]]:
    """Windows that no calibration of the benchmarks looks at."""
    tokenizer = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    return windows(lambda text: tokenizer.encode(text, add_special_tokens=False).ids, 0, WINDOWS)[1]


def as_answers(texts: list[list[int]]) -> dict[str, list[list[int]]]:
    """Each text as the answer to its own first token."""
    return {"prompts": [ids[:1] for ids in texts], "answers": [ids[1:] for ids in texts]}


def agreement(reference: list[list[int]], answers: list[list[int]], limit: int, eos: int) -> tuple[float, int, float]:
    """Share of equal tokens, answers equal throughout, mean tokens before the first difference.

    An answer that ends early counts as different from there on. Some peers leave out the end token, so it is put back.
    """
    same = whole = before = 0
    for theirs, ours in zip(reference, answers, strict=True):
        end = [eos] if len(ours) < limit and ours[-1:] != [eos] else []
        equal = [a == b for a, b in zip(theirs, [*ours, *end], strict=False)]
        equal += [False] * (len(theirs) - len(equal))
        same += sum(equal)
        whole += all(equal)
        before += equal.index(False) if False in equal else len(equal)
    return same / sum(map(len, reference)), whole, before / len(reference)


def compare(ready: list[Ready], model: Path, threads: int) -> list[dict[str, Any]]:
    """What the tables say of every row; raises PeersError where the reference fails."""
    prompts = tokenize(model)
    eos: int = json.loads((model / "config.json").read_text())["eos_token_id"]
    reference_row = prepare(Row("reference", "hf", 32, option="fp32"), model)

    def run(one: Ready, work: dict[str, Any]) -> dict[str, Any]:
        return run_worker(one, {"tokens": LONGEST, "prompts": prompts, **work}, threads, TIMEOUT_S)

    found = []
    with tempfile.TemporaryDirectory() as folder:
        logits = str(Path(folder) / "logits.npy")
        greedy = run(reference_row, {"work": "greedy"})
        if "error" in greedy:
            raise PeersError(f"the reference failed: {greedy['error']}")
        reference = greedy["answers"]
        forced = {"work": "teacher", "answers": reference}
        text = str(Path(folder) / "text.npy")
        read = {"work": "teacher", **as_answers(documentation(model))}
        for work, path in ((forced, logits), (read, text)):
            first = run(reference_row, {**work, "save_to": path})
            if "error" in first:
                raise PeersError(f"the reference failed: {first['error']}")
        for one in ready:
            line: dict[str, Any] = {"name": one.row.name}
            answers = run(one, {"work": "greedy"})
            if "error" in answers:
                found.append(line | {"error": answers["error"]})
                continue
            share, whole, before = agreement(reference, answers["answers"], LONGEST, eos)
            line |= {"greedy": round(share, 4), "same_answers": whole, "before_difference": round(before, 2)}
            line["teacher"] = run(one, {**forced, "compare_with": logits}).get("teacher")
            line["text"] = run(one, {**read, "compare_with": text}).get("teacher") if line["teacher"] else None
            found.append(line)
            print(json.dumps(line), file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="PEER|ROW")
    parser.add_argument("--threads", type=int, default=len(host.usable_cores()))
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    arguments = parser.parse_args()
    model = MODELS / SMOLLM2
    try:
        if not tensor_shapes(model):
            raise PeersError(f"no checkpoint in {model}: run python -m benchmarks.peers {SMOLLM2} --prepare")
        ready, failed = prepare_all(choose([*read_rows(), *CALIBRATED], SMOLLM2, arguments.only), model, {})
        rows = compare(ready, model, arguments.threads) + [{"name": row.name, "error": error} for row, error in failed]
    except PeersError as error:
        raise SystemExit(f"peers: {error}.") from None
    result = {
        "shape": SMOLLM2,
        "prompts": len(QUESTIONS),
        "longest": LONGEST,
        "date": date.today().isoformat(),
        "rows": rows,
        "machine": machine.describe(),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "agreement.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(path)


if __name__ == "__main__":
    main()
