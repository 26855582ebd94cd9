"""The numbers of the report, held against numbers counted another way."""

from __future__ import annotations

import random
import statistics
from collections import Counter
from typing import Any

from belle_compile.compiler.requests.coverage import coverage_report, notes
from belle_compile.compiler.requests.page import coverage_page
from belle_compile.compiler.requests.request import Request
from belle_compile.compiler.requests.selection import Selection, SelectOptions, select
from belle_compile.compiler.requests.units import Characters
from tests.compiler.requests.samples import distinct_texts

KINDS = ["qa"] * 7 + ["<b>math</b>"] * 3


def made() -> tuple[list[Request], Selection, dict[str, Any]]:
    chance = random.Random(5)
    texts = distinct_texts(400, longest=900)
    texts += [*chance.sample(texts, 100), "", "x"]
    given = [Request(text=text, labels={"kind": chance.choice(KINDS)}, line=line) for line, text in enumerate(texts, 1)]
    options = SelectOptions(size=80, holdout=20, labels=("kind",), redact=True)
    selection = select(given, options, Characters())
    return given, selection, coverage_report(selection, options, Characters())


def test_requests_and_drops() -> None:
    _, _, report = made()
    assert report["requests"] == {"read": 502, "kept": 400, "calibration": 80, "holdout": 20}
    assert report["dropped"] == {"empty": 1, "too short": 1, "too long": 0, "exact duplicate": 100, "near duplicate": 0}
    assert report["redacted"] == {"phone": 0, "email": 0, "id": 0}


def test_lengths() -> None:
    given, selection, report = made()
    for name, requests in (("read", given), ("calibration", selection.calibration), ("holdout", selection.holdout)):
        lengths = [len(request.text or "") for request in requests]
        assert report["length"][name] == {
            "least": min(lengths), "greatest": max(lengths), "median": statistics.median_low(lengths),
            "mean": round(statistics.fmean(lengths), 2),
        }  # fmt: skip
        for row in report["length"]["histogram"]:
            assert row[name] == sum(row["from"] <= length <= row["to"] for length in lengths)
        assert sum(row[name] for row in report["length"]["histogram"]) == len(lengths)


def test_labels() -> None:
    given, selection, report = made()
    rows = report["labels"]["kind"]
    assert [row["value"] for row in rows] == ["qa", "<b>math</b>"]
    for name, requests in (("read", given), ("calibration", selection.calibration), ("holdout", selection.holdout)):
        counts = Counter(request.labels["kind"] for request in requests)
        assert {row["value"]: row[name] for row in rows} == counts
        assert sum(row[f"{name}_share"] for row in rows) == 1


def test_tokens() -> None:
    given, selection, report = made()
    everything = "".join(request.text or "" for request in given)
    tokens = report["tokens"]
    assert (tokens["distinct"], tokens["occurrences"]) == (len({*everything}), len(everything))
    for name, requests in (("calibration", selection.calibration), ("holdout", selection.holdout)):
        known = {*"".join(request.text or "" for request in requests)}
        assert tokens[name]["distinct"] == len(known)
        assert tokens[name]["distinct_share"] == round(len(known) / len({*everything}), 6)
        assert tokens[name]["occurrence_share"] == round(sum(each in known for each in everything) / len(everything), 6)
    known = {*"".join(request.text or "" for request in selection.calibration)}
    missing = Counter(each for each in everything if each not in known)
    shown = [(row["token"], row["occurrences"]) for row in tokens["most_frequent_missing"]]
    assert shown == sorted(missing.items(), key=lambda item: (-item[1], item[0]))[:20]


def test_notes() -> None:
    _, _, report = made()
    assert len(notes(report)) == 1 and notes(report)[0].startswith("No tokenizer was given")
    few = select([Request(text="写诗", line=1)], SelectOptions(), Characters())
    found = notes(coverage_report(few, SelectOptions(), Characters()))
    assert "Fewer requests than asked for were left: 1 of 512 for calibration and 0 of 128 for holdout." in found
    shared = report | {"shared_beginning": 40, "strata": {"kept": 9, "without_calibration_request": 2}}
    assert any("begin with the same 40 characters" in note for note in notes(shared))
    assert any("2 of 9 strata" in note for note in notes(shared))


def test_the_page_shows_the_numbers_and_loads_nothing() -> None:
    _, _, report = made()
    source = {"name": "x.jsonl", "sha256": "5a" * 32}
    page = coverage_page(report, {"source": source, "digest": "d1" * 32, "options": {"labels": ["kind"], "seed": 0}})
    assert "&lt;b&gt;math&lt;/b&gt;" in page and "<b>math</b>" not in page, "labels are the users' text"
    bars = len(report["length"]["histogram"]) + len(report["labels"]["kind"])
    assert page.count("<svg") == 2 and page.count("<rect") == 3 * bars
    for text in ("502", "dropped: exact duplicate", "d1" * 32, "5a" * 32, "width=device-width", "No tokenizer was given"):
        assert text in page
    assert not any(link in page for link in ("http://", "https://", "src=", "href=", "@import", "url("))
    share = report["labels"]["kind"][0]["calibration_share"]
    assert f">{100 * share:.1f}%<" in page
    longest = max(row["read_share"] for row in report["labels"]["kind"])
    assert longest > 0.5 and 'width="290.0"' in page, "the longest bar fills the plot"
