"""An answer depends on its request alone: 100 calls that use every field, answered in every way, compared bit for bit."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from belle_compile.compiler.driver import BuildRequest, build
from belle_compile.runtime import Engine
from belle_compile.runtime.host import host_isas
from benchmarks.invariance.requests import Case, cases, longest
from benchmarks.invariance.ways import Answer, answer, ways
from tests import kernel_cache

kernel_cache.install()

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tiny-bloom-trained"
CALLS, LONGEST_ANSWER = 100, 64
ISAS = (*(isa for isa in host_isas() if isa != "avx2"), "avx2")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("invariance") / "engine"
    return build(BuildRequest(str(FIXTURE), out, isas=ISAS, drift=False))


@pytest.fixture(scope="module")
def calls() -> list[Case]:
    lines = (FIXTURE / "heldout-zh.txt").read_text(encoding="utf-8").splitlines()
    return cases([line for line in lines if line.strip()], CALLS, LONGEST_ANSWER)


@pytest.mark.parametrize("isa", ISAS)
def test_answers_are_the_same_in_every_way(engine: Path, calls: list[Case], isa: str, tmp_path: Path) -> None:
    load = partial(Engine.load, engine, isa=isa)
    expected: list[Answer] = []
    for name, way in ways(f"sqlite:{tmp_path}/answers.db").items():
        answers, facts = answer(way, load, calls, longest(engine, calls))
        expected = expected or answers
        assert len(answers) == len(expected) > CALLS
        different = [i for i, pair in enumerate(zip(expected, answers, strict=True)) if not pair[0].same(pair[1])]
        assert not different, f"{name}: answers {different[:5]} differ, {facts}"


@pytest.mark.parametrize(
    "change",
    [
        {"token_ids": (5, 7)}, {"text": "b"}, {"finish_reason": "stop"}, {"logprobs": ((5, -0.5), (6, -0.2500001))},
        {"prompt_logprobs": ()}, {"alternatives": ((5, -0.5),)},
    ],
)  # fmt: skip
def test_any_difference_is_seen(change: dict[str, Any]) -> None:
    one = Answer((5, 6), "a", "length", ((5, -0.5), (6, -0.25)), ((4, -1.0),), ((5, -0.5), (9, -0.75)))
    assert one.same(one._replace()) and one.same(one._replace(alternatives=None))
    assert not one.same(one._replace(**change))
