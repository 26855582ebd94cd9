"""Engines of several ranks, run by belle-run: the tokens of one rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("mpi4py")

from belle_compile.compiler.driver import BuildRequest, build
from tests.parity.engines import BEST_ISA, Builder
from tests.parity.variants import make_bloom, make_llama

ROOT = Path(__file__).parents[2]
SAMPLED = ("--temperature", "1", "--top-k", "20", "--top-p", "0.9", "--repetition-penalty", "1.2", "--seed", "7")
GREEDY = ("--temperature", "0", "--repetition-penalty", "1")
PENALIZED = ("--temperature", "0", "--repetition-penalty", "1.3")
LINES = "one two three\n你好,世界\n" + "a long line that goes on " * 20 + "\n"


@cache
def checkpoint(root: Path, family: str) -> Path:
    """With heads for four ranks, two layers, and a vocabulary that four do not share evenly."""
    if family == "bloom":
        return make_bloom(root / "ranks-bloom", hidden_size=128, n_head=4, n_layer=2)
    sizes = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 8, "num_key_value_heads": 4,
             "max_position_embeddings": 1024}  # fmt: skip
    return make_llama(root / "ranks-llama", num_hidden_layers=2, **sizes)


@cache
def engine(root: Path, family: str, target: str) -> Path:
    out = root / f"ranks-{family}-{target}"
    return build(BuildRequest(checkpoint(root, family), out, target=target, quantization="none", isas=(BEST_ISA,)))


def answers(directory: Path, sampling: tuple[str, ...]) -> list[list[int]]:
    """Token ids of an answer to each of LINES."""
    command = [
        sys.executable,
        "-m",
        "belle_compile.runtime",
        str(directory),
        "--json",
        "--raw",
        "--ignore-eos",
        "--kv-tokens",
        "4096",
    ]
    done = subprocess.run(
        [*command, "--max-new-tokens", "24", *sampling], cwd=ROOT, input=LINES, capture_output=True, text=True, timeout=90,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return [json.loads(line)["token_ids"] for line in done.stdout.splitlines()]


@pytest.mark.parametrize("sampling", [GREEDY, PENALIZED, SAMPLED], ids=["greedy", "penalized", "sampled"])
@pytest.mark.parametrize("target", ["cpux2", "cpux4"])
@pytest.mark.parametrize("family", ["bloom", "llama"])
def test_answers_are_those_of_one_rank(builder: Builder, family: str, target: str, sampling: tuple[str, ...]) -> None:
    expected = answers(engine(builder.root, family, "cpu"), sampling)
    assert len(expected) == 3 and answers(engine(builder.root, family, target), sampling) == expected
