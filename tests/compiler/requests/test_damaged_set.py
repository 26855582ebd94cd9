"""Lines of a calibration set whose digests were renewed after a change."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.requests import SelectOptions, open_set, write_set


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        "{",
        '{"text": 5}',
        '{"text": "a", "token_ids": [1]}',
        '{"token_ids": [1.5]}',
        '{"messages": [{"role": "user"}]}',
        '{"messages": [3]}',
        '{"text": "a", "labels": {"kind": []}}',
        '{"text": "a", "other": 1}',
        '{"text": "a", "line": "1"}',
        "[" * 100_000,
    ],
)
def test_other_lines_than_those_that_are_written(tmp_path: Path, line: str) -> None:
    source, out = tmp_path / "requests.jsonl", tmp_path / "set"
    source.write_text("".join(json.dumps({"text": f"request {number} of several"}) + "\n" for number in range(6)))
    write_set(source, out, SelectOptions(size=3, holdout=2))
    (out / "calibration.jsonl").write_text(line + "\n")
    description = json.loads((out / "set.json").read_text())
    digests = {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in ("calibration.jsonl", "holdout.jsonl")}
    for name, digest in digests.items():
        description["files"][name]["sha256"] = digest
    description["digest"] = hashlib.sha256(
        "".join(f"{digest}  {name}\n" for name, digest in digests.items()).encode()
    ).hexdigest()
    (out / "set.json").write_text(json.dumps(description))
    with pytest.raises(
        CompileError, match=r"requests of .*calibration\.jsonl: found .*, expected requests as calibrate-set writes"
    ):
        open_set(out)
