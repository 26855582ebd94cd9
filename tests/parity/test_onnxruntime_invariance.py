"""An answer depends on its request alone, under ONNX Runtime too: calls that use every field, answered in several ways."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime")

from belle_compile.compiler.driver import BuildRequest, build
from belle_compile.runtime import Engine
from benchmarks.invariance.requests import cases, longest
from benchmarks.invariance.ways import Answer, answer, ways

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tiny-bloom-trained"
CALLS, LONGEST_ANSWER = 24, 64
WAYS = ("alone and cold", "together", "few blocks, others given up", "prefix hits", "prefix hits, streamed", "HTTP")


def test_answers_are_the_same_in_every_way(tmp_path: Path) -> None:
    engine = build(BuildRequest(str(FIXTURE), tmp_path / "engine", backend="onnxruntime", drift=False))
    lines = (FIXTURE / "heldout-zh.txt").read_text(encoding="utf-8").splitlines()
    calls = cases([line for line in lines if line.strip()], CALLS, LONGEST_ANSWER)
    load, every = partial(Engine.load, engine, threads=2), ways()
    expected: list[Answer] = []
    for name in WAYS:
        answers, facts = answer(every[name], load, calls, longest(engine, calls))
        expected = expected or answers
        assert len(answers) == len(expected) >= CALLS
        different = [i for i, pair in enumerate(zip(expected, answers, strict=True)) if not pair[0].same(pair[1])]
        assert not different, f"{name}: answers {different[:5]} differ, {facts}"
