"""The requests that the benchmark of calibrate-set makes are what it says they are, and its check notices a wrong report."""

from __future__ import annotations

import copy
import random
from collections import Counter
from itertools import combinations

import pytest

from belle_compile.compiler.requests.coverage import coverage_report
from belle_compile.compiler.requests.duplicates import normalized
from belle_compile.compiler.requests.request import Request
from belle_compile.compiler.requests.selection import SelectOptions, select
from belle_compile.compiler.requests.units import Characters
from benchmarks import calibrate_set
from benchmarks.calibrate_set import EMPTY, LONG, Made, make
from tests.compiler.requests.samples import jaccard

COUNT = 700


@pytest.fixture(scope="module")
def requests() -> list[Made]:
    chance = random.Random(1)
    pieces = ["".join(chr(0x4E00 + chance.randrange(3000)) for _ in range(chance.randint(6, 30))) for _ in range(300)]
    real = [("，".join(chance.sample(pieces, chance.randint(3, 8))), chance.choice(["open qa", "code"])) for _ in range(60)]
    return make(real, COUNT)


def test_what_is_made(requests: list[Made]) -> None:
    reasons = Counter(made.reason for made in requests)
    assert reasons.total() == COUNT and (reasons["empty"], reasons["too long"]) == (EMPTY, LONG)
    assert (reasons[""], reasons["exact duplicate"]) == (0.4 * COUNT, 0.3 * COUNT)
    originals = [normalized(made.text) for made in requests if not made.reason]
    assert max(jaccard(one, other) for one, other in combinations(originals[:120], 2)) < 0.6


def test_originals_come_before_what_is_made_of_them(requests: list[Made]) -> None:
    seen: list[str] = []
    for made in requests:
        text = normalized(made.text)
        if made.reason == "exact duplicate":
            assert text in seen
        elif made.reason == "near duplicate":
            assert text not in seen and max(jaccard(text, other) for other in seen if len(other) > 4) >= 0.9
        elif not made.reason:
            assert text not in seen
            seen.append(text)


def test_the_check_notices_wrong_counts(requests: list[Made]) -> None:
    given = [Request(text=made.text, labels={"class": made.label}, line=line) for line, made in enumerate(requests, 1)]
    options = SelectOptions(size=COUNT, holdout=0, labels=("class",))
    selection = select(given, options, Characters())
    coverage, kept = coverage_report(selection, options, Characters()), {request.line for request in selection.calibration}
    assert calibrate_set.check(requests, coverage, kept)["distinct_dropped_as_near_duplicates"] == 0
    for where in ("dropped", "exact duplicate"), ("requests", "read"), ("tokens", "occurrences"):
        wrong = copy.deepcopy(coverage)
        wrong[where[0]][where[1]] += 1
        with pytest.raises(AssertionError):
            calibrate_set.check(requests, wrong, kept)
    with pytest.raises(AssertionError):
        calibrate_set.check(requests, coverage, kept - {min(kept)})
