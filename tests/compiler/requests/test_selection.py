"""What is chosen: how many, of which strata, the same again, and nothing twice."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.requests.request import Request
from belle_compile.compiler.requests.selection import Selection, SelectOptions, select
from belle_compile.compiler.requests.strata import bucket
from belle_compile.compiler.requests.units import Characters
from tests.compiler.requests.samples import distinct_texts

KINDS = ["qa"] * 60 + ["code"] * 30 + ["math"] * 9 + ["rare"]


def requests(count: int = 1000) -> list[Request]:
    chance = random.Random(3)
    return [
        Request(text=text, labels={"kind": chance.choice(KINDS)}, line=line)
        for line, text in enumerate(distinct_texts(count, longest=500), 1)
    ]


def chosen(given: list[Request], **options: object) -> Selection:
    return select(given, replace(SelectOptions(), **options), Characters())  # type: ignore[arg-type]


def texts(selected: tuple[Request, ...]) -> list[str | None]:
    return [request.text for request in selected]


def test_sizes_and_disjoint_parts_in_the_order_of_the_file() -> None:
    found = chosen(requests(), size=200, holdout=50)
    assert (len(found.calibration), len(found.holdout)) == (200, 50)
    lines = [request.line for request in found.calibration], [request.line for request in found.holdout]
    assert not {*lines[0]} & {*lines[1]} and all(each == sorted({*each}) for each in lines)


def test_shares_of_lengths_and_labels() -> None:
    given = requests()
    found = chosen(given, size=200, holdout=50, labels=("kind",))
    for part in (found.calibration, found.holdout):
        for measure in (lambda request: request.labels["kind"], lambda request: bucket(len(request.text or ""))):
            shares, expected = Counter(map(measure, part)), Counter(map(measure, given))
            for value, count in expected.items():
                assert abs(shares[value] / len(part) - count / len(given)) < 0.05
    assert {request.labels["kind"] for request in found.calibration} == {*KINDS}


def test_every_stratum_has_a_calibration_request_where_there_is_room() -> None:
    given = requests(300)

    def strata(part: tuple[Request, ...] | list[Request]) -> set[tuple[int, str]]:
        return {(bucket(len(request.text or "")), request.labels["kind"]) for request in part}

    found = chosen(given, size=60, holdout=20, labels=("kind",))
    assert strata(found.calibration) == strata(given) and found.strata_left_out == 0
    assert found.strata == len(strata(given)) < 60
    scarce = chosen(given, size=5, holdout=0, labels=("kind",))
    assert scarce.strata_left_out == found.strata - len(strata(scarce.calibration)) > 0


def test_the_seed_decides_and_the_order_does_not() -> None:
    given = requests()
    first = chosen(given, size=100, seed=1)
    assert chosen(given, size=100, seed=1) == first
    shuffled = random.Random(9).sample(given, len(given))
    again = chosen(shuffled, size=100, seed=1)
    assert (again.calibration, again.holdout) == (first.calibration, first.holdout)
    other = chosen(given, size=100, seed=2)
    assert len({*texts(first.calibration)} & {*texts(other.calibration)}) < 40


def test_what_is_dropped_and_why() -> None:
    long = "长" * 2000
    given = [
        *requests(50),
        *(Request(text=text, labels={"kind": "qa"}, line=line) for line, text in enumerate(
            ["", " \u3000 ", "?", "你", "？ ", long, long, requests(50)[0].text, "短信", "短 信", "短信 "], 51)),
    ]  # fmt: skip
    found = chosen(given, max_length=1500)
    assert found.dropped == {"empty": 2, "too short": 3, "too long": 2, "exact duplicate": 2, "near duplicate": 0}
    assert found.read.requests == 61 and found.kept.requests == 52
    assert found.kept.requests == found.read.requests - sum(found.dropped.values())


def test_fewer_than_asked_for() -> None:
    found = chosen(requests(50), size=512, holdout=128)
    assert (len(found.calibration), len(found.holdout)) == (40, 10)
    found = chosen(requests(2), size=512, holdout=128)
    assert (len(found.calibration), len(found.holdout)) == (1, 1)
    found = chosen(requests(1), size=512, holdout=128)
    assert (len(found.calibration), len(found.holdout)) == (1, 0)


def test_nothing_left() -> None:
    with pytest.raises(CompileError, match=r"no request is left: found 2 empty, 1 too short, expected requests with text"):
        chosen([Request(text=text, line=1) for text in ("", " ", "x")])


def test_redaction_comes_before_everything_else() -> None:
    calls = [Request(text=f"请给1381234567{digit}打电话", line=digit + 1) for digit in range(8)]
    found = chosen(calls, redact=True)
    assert texts(found.calibration) == ["请给[PHONE]打电话"] and found.holdout == ()
    assert found.dropped["exact duplicate"] == 7 and found.redacted == {"phone": 8, "email": 0, "id": 0}
    assert not any(unit in found.read.units for unit in "138")
    plain = chosen(calls)
    assert plain.redacted is None and plain.dropped["exact duplicate"] == 0


def test_a_label_with_a_value_for_each_request() -> None:
    given = [replace(request, labels={"user": str(request.line)}) for request in requests(1100)]
    with pytest.raises(CompileError, match=r"label field user: found more than 1000 different values in .*; choose another"):
        chosen(given, labels=("user",))


@pytest.mark.parametrize(
    "options", [{"size": 0}, {"holdout": -1}, {"seed": -1}, {"similarity": 0.0}, {"similarity": 1.1}, {"max_length": 0}]
)
def test_options_out_of_bounds(options: dict[str, float]) -> None:
    with pytest.raises(CompileError, match=rf"calibration: option {next(iter(options))}: found .*, expected "):
        SelectOptions(**options)  # type: ignore[arg-type]
