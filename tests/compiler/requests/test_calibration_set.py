"""The directory: the same bytes again, nothing half-written, and opened only as it was made."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.requests import Request, SelectOptions, open_set, write_set
from tests.compiler.requests.samples import distinct_texts, write_lines
from tests.compiler.requests.test_units import write_tokenizer

ROOT = Path(__file__).parents[3]
FILES = ["calibration.jsonl", "coverage.html", "coverage.json", "holdout.jsonl", "set.json"]
OPTIONS = SelectOptions(size=40, holdout=10, labels=("kind",))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    texts = distinct_texts(120)
    records = [{"question": text, "std_answer": text[:3], "kind": "ab"[len(text) % 2]} for text in [*texts, *texts[:9]]]
    return write_lines(tmp_path / "requests.jsonl", records)


@pytest.fixture
def made(source: Path) -> Path:
    write_set(source, source.parent / "set", OPTIONS)
    return source.parent / "set"


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_what_the_directory_holds(source: Path, made: Path) -> None:
    assert list(content(made)) == FILES
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in made.iterdir())
    described = json.loads((made / "set.json").read_text())
    assert described["source"] == {
        "name": "requests.jsonl", "bytes": source.stat().st_size, "sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
    }  # fmt: skip
    assert described["options"] == {
        "size": 40, "holdout": 10, "seed": 0, "labels": ["kind"], "redact": False, "similarity": 0.8, "max_length": 32768,
        "field": None, "answer": None, "tokenizer": None,
    }  # fmt: skip
    assert described["dropped"]["exact duplicate"] == 9
    for name, record in described["files"].items():
        assert record == {
            "sha256": hashlib.sha256((made / name).read_bytes()).hexdigest(), "bytes": (made / name).stat().st_size,
        }  # fmt: skip
    listing = subprocess.run(["sha256sum", "calibration.jsonl", "holdout.jsonl"], cwd=made, capture_output=True, check=True)
    assert described["digest"] == hashlib.sha256(listing.stdout).hexdigest()
    first = json.loads((made / "calibration.jsonl").read_text().splitlines()[0])
    line = json.loads(source.read_text().splitlines()[first["line"] - 1])
    assert first == {
        "line": first["line"], "text": line["question"], "answer": line["std_answer"], "labels": {"kind": line["kind"]},
    }  # fmt: skip


def test_what_is_written_is_what_is_opened(made: Path, source: Path) -> None:
    opened = open_set(made)
    assert (len(opened.calibration), len(opened.holdout)) == (40, 10)
    assert all(isinstance(request, Request) and request.answer for request in opened.calibration)
    assert opened.digest == opened.description["digest"]
    in_memory = open_set(source, OPTIONS)
    assert (in_memory.calibration, in_memory.holdout, in_memory.digest) == (opened.calibration, opened.holdout, opened.digest)
    assert len(open_set(source).calibration) == 96, "four fifths of 120: the defaults ask for more than there are"
    assert open_set(source, SelectOptions(size=40, holdout=10, seed=1)).digest != opened.digest


def test_the_same_bytes_in_other_processes(source: Path, made: Path, tmp_path: Path) -> None:
    code = """if True:
        import sys
        from belle_compile.compiler.requests import SelectOptions, write_set
        write_set(sys.argv[1], sys.argv[2], SelectOptions(size=40, holdout=10, labels=("kind",)))
    """
    for seed in ("1", "2"):
        command = [sys.executable, "-c", code, str(source), str(tmp_path / f"set{seed}")]
        subprocess.run(command, cwd=ROOT, env={"PYTHONHASHSEED": seed, "PATH": ""}, check=True, timeout=60)
        assert content(tmp_path / f"set{seed}") == content(made)


def test_chats_and_token_ids_survive(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "写一首诗"}, {"role": "assistant", "content": "好"}]},
        {"token_ids": [1, 2, 3]},
    ]
    write_set(write_lines(tmp_path / "x.jsonl", records), tmp_path / "set", SelectOptions(holdout=0))
    chat, ids = open_set(tmp_path / "set").calibration
    assert (chat.messages, chat.answer) == (({"role": "user", "content": "写一首诗"},), "好")
    assert ids.token_ids == (1, 2, 3)


def test_nothing_of_what_was_redacted_is_stored(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "x.jsonl", [{"text": f"第{i}封信寄给 me{i}@example.com 或1381234567{i}"} for i in range(9)])
    report = write_set(source, tmp_path / "set", SelectOptions(redact=True, similarity=1))
    assert report["redacted"] == {"phone": 9, "email": 9, "id": 0}
    for stored in content(tmp_path / "set").values():
        assert b"example.com" not in stored and b"13812345" not in stored


def test_a_tokenizer_is_recorded(source: Path, tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer.json")
    report = write_set(source, tmp_path / "set", tokenizer=tokenizer)
    assert report["options"]["tokenizer"]["name"] == "tokenizer.json"
    assert report["coverage"]["length"]["unit"] == "tokens"


def test_an_existing_directory(source: Path, made: Path) -> None:
    before = content(made)
    with pytest.raises(
        CompileError, match=r"set exists already; choose another -o or pass --force to replace a calibration set"
    ):
        write_set(source, made)
    write_set(source, made, OPTIONS, force=True)
    assert content(made) == before
    (made / "set.json").unlink()
    with pytest.raises(
        CompileError,
        match=r"--force replaces calibration set directories only .*expected a directory with the set\.json of",
    ):
        write_set(source, made, force=True)


def test_a_wrong_line_leaves_nothing(source: Path, made: Path, tmp_path: Path) -> None:
    before = content(made)
    with source.open("a") as file:
        file.write("broken\n")
    for output in (tmp_path / "new" / "set", made):
        with pytest.raises(CompileError, match="line 130 of"):
            write_set(source, output, OPTIONS, force=True)
    assert content(made) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["requests.jsonl", "set"]


@pytest.mark.parametrize("name", ["calibration.jsonl", "holdout.jsonl"])
def test_a_changed_file(made: Path, name: str) -> None:
    changed = bytearray((made / name).read_bytes())
    changed[-4] ^= 1
    (made / name).write_bytes(changed)
    with pytest.raises(
        CompileError, match=rf"{name} was changed after the set was made: found digest .* expected .* copy the set"
    ):
        open_set(made)
    (made / name).unlink()
    with pytest.raises(CompileError, match=rf"set is incomplete: found no {name}"):
        open_set(made)


def test_a_changed_description(made: Path) -> None:
    described = json.loads((made / "set.json").read_text())
    for change, sentence in (
        ({"digest": "0" * 64}, r"set\.json was changed after the set was made: found digest 0000"),
        ({"format_version": 2}, r"format of .*set\.json: found 2, expected 1; make the set anew"),
        ({"files": {}}, r"set\.json: found something else, expected the description of a set"),
        ({"digest": None}, r"set\.json: found something else"),
    ):
        (made / "set.json").write_text(json.dumps(described | change))
        with pytest.raises(CompileError, match=sentence):
            open_set(made)
    (made / "set.json").write_text("[]")
    with pytest.raises(CompileError, match="found something else"):
        open_set(made)


def test_what_is_no_set(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match=r"is not a calibration set: found no set\.json; give a directory that .* or a file"):
        open_set(tmp_path)
    with pytest.raises(CompileError, match="found nothing there, expected a file of requests"):
        open_set(tmp_path / "missing")
