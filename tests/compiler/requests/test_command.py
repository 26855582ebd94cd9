"""belle-compile calibrate-set: a table or JSON on stdout, one sentence on stderr when something does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from belle_compile.compiler.requests import open_set
from tests.compiler.requests.samples import distinct_texts, write_lines
from tests.compiler.test_cli import fail, run


@pytest.fixture
def source(tmp_path: Path) -> Path:
    texts = distinct_texts(60)
    records = [{"ask": f"{text} 13812345678", "reply": "r", "kind": "k"} for text in [*texts, texts[0]]]
    return write_lines(tmp_path / "requests.jsonl", records)


def test_the_table(capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    status, table, err = run(
        capsys, "calibrate-set", source, "-o", out, "--field", "ask", "--size", 20, "--holdout", 5, "--redact"
    )
    assert status == 0 and [line.split()[1] for line in err.splitlines()] == ["read:", "report:"]
    rows = dict(line.split("  ", 1) for line in table.splitlines())
    rows = {name: value.strip() for name, value in rows.items()}
    assert rows["from"].startswith("requests.jsonl: 61 requests") and rows["dropped: exact duplicate"] == "1"
    assert rows["calibration"] == "20 of 20 asked for" and rows["held out"] == "5 of 5 asked for"
    assert rows["redacted"] == "61 phone, 0 email, 0 id"
    assert rows["digest"] == open_set(out).digest and rows["report"] == f"{out}/coverage.html"


def test_json_and_all_options(capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    options = [
        "--field",
        "ask",
        "--answer",
        "reply",
        "--label",
        "kind",
        "--seed",
        3,
        "--similarity",
        0.9,
        "--max-length",
        99,
        "--force",
    ]
    status, text, _ = run(capsys, "calibrate-set", source, "-o", out, "--json", *options)
    found = json.loads(text)
    assert status == 0 and found["set"] == str(out) and found["run"]["peak_memory_bytes"] > 1 << 20
    assert found["digest"] == open_set(out).digest
    assert found["coverage"] == json.loads((out / "coverage.json").read_text())
    assert {name: found["options"][name] for name in ("field", "answer", "labels", "seed", "similarity", "max_length")} == {
        "field": "ask", "answer": "reply", "labels": ["kind"], "seed": 3, "similarity": 0.9, "max_length": 99,
    }  # fmt: skip
    assert open_set(out).calibration[0].answer == "r"


def test_errors(capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path) -> None:
    assert "found the fields ask, reply, kind, expected one of text" in fail(
        capsys, "calibrate-set", source, "-o", tmp_path / "set"
    )
    assert "missing: found nothing there" in fail(capsys, "calibrate-set", tmp_path / "missing", "-o", tmp_path / "set")
    assert [path.name for path in tmp_path.iterdir()] == ["requests.jsonl"]
    assert run(capsys, "calibrate-set", source, "-o", tmp_path / "set", "--size", 0)[0] == 2
    assert run(capsys, "calibrate-set", source)[0] == 2
