"""Standard streams that are closed, full or in another encoding: one sentence, exit code 1, and no file in their place."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from belle_compile.runtime import Engine
from belle_compile.runtime.cli import main
from tests.runtime.fakes import make_directory, make_engine

_ECHO = """
import sys
from belle_compile.runtime.standard_streams import standard_streams

with standard_streams("prog"):
    print("begun", file=sys.stderr)
    for line in sys.stdin:
        print(line.strip() or "empty")
    print("\\u8bd7" * 3)
"""
_LAST = 'print("\\u8bd7" * 3)'


def run(script: str = _ECHO, redirect: str = "", stdin: bytes = b"", **environment: str) -> tuple[int, str, str]:
    """Exit code, output and errors of a script whose streams a shell has redirected."""
    done = subprocess.run(
        ["/bin/sh", "-c", f'exec "$0" -c "$1" {redirect}', sys.executable, script],
        input=stdin, capture_output=True, timeout=60,
        env={"PYTHONPATH": ":".join(sys.path), "LC_ALL": "C.UTF-8", **environment},
    )  # fmt: skip
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.mark.parametrize(
    "environment", [{}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"PYTHONIOENCODING": "utf-8"}]
)
def test_streams_that_work(environment: dict[str, str]) -> None:
    code, out, errors = run(stdin="\ufeff你\n\nb".encode(), **environment)
    assert (code, errors) == (0, "begun\n")
    assert out in ("你\nempty\nb\n诗诗诗\n", "\\u4f60\nempty\nb\n\\u8bd7\\u8bd7\\u8bd7\n")


@pytest.mark.parametrize(
    ("redirect", "expected"),
    [
        (">/dev/full", "begun\nprog: the output cannot be written: found No space left on device.\n"),
        (">&-", "prog: the output cannot be written: found that it is closed.\n"),
        (">&- <&-", "prog: the output cannot be written: found that it is closed.\n"),
        (">/dev/full 2>&-", ""),
        (">&- 2>&-", ""),
    ],
)
def test_outputs_that_take_nothing(redirect: str, expected: str) -> None:
    assert run(redirect=redirect) == (1, "", expected)


def test_an_output_that_is_full_only_when_it_is_flushed() -> None:
    script = _ECHO.replace(_LAST, 'print("x")')
    assert run(script, ">/dev/full") == (1, "", "begun\nprog: the output cannot be written: found No space left on device.\n")


def test_a_reader_that_leaves_is_no_fault() -> None:
    script = _ECHO.replace(_LAST, 'print("x" * 10**6)')
    assert run(script, "| true") == (0, "", "begun\n")


def test_an_input_that_is_closed_is_empty() -> None:
    assert run(redirect="<&-") == (0, "诗诗诗\n", "begun\n")
    assert run(redirect="<&- 2>&-") == (0, "诗诗诗\n", "")


def test_files_do_not_take_the_place_of_closed_streams(tmp_path: Path) -> None:
    script = _ECHO.replace('print("begun", file=sys.stderr)', "file = open(sys.executable); print(file.fileno() > 2)")
    assert run(script, "<&- 2>&-") == (0, "True\n诗诗诗\n", "")


@pytest.mark.parametrize("text", ["写一首诗\n", "a\n你好", "好" * 10000])
@pytest.mark.parametrize(
    "environment", [{}, {"PYTHONIOENCODING": "utf-8:surrogateescape"}, {"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}]
)
def test_inputs_that_are_no_utf8(text: str, environment: dict[str, str]) -> None:
    code, _, errors = run(stdin=text.encode("gb18030"), **environment)
    assert code == 1 and errors.startswith("begun\nprog: input: it cannot be read: found byte 0x")
    assert errors.endswith(", which is no UTF-8 there; convert it, for example with iconv -f GB18030 -t UTF-8.\n")


@pytest.mark.parametrize("redirect", [">/dev/full", ">&-"])
def test_errors_are_raised_for_developers(redirect: str) -> None:
    code, _, errors = run(redirect=redirect, BELLE_TRACEBACK="1")
    assert code != 0 and "Traceback" in errors and "OSError: [Errno" in errors


def test_errors_of_files_are_not_of_the_streams() -> None:
    code, _, errors = run(_ECHO.replace("print(", "open('/none'); print(", 1))
    assert code == 1 and "FileNotFoundError" in errors and "output" not in errors


@pytest.fixture
def _loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "load", lambda directory, **options: make_engine())


@pytest.mark.usefixtures("_loads")
def test_the_command_reads_texts_with_a_mark_and_refuses_other_encodings(tmp_path: Path) -> None:
    engine = str(make_directory(tmp_path / "engine", {"tokenizer.json": b"{}"}))

    def prompts(stdin: bytes) -> Any:
        return CliRunner().invoke(main, [engine, "--json", "--max-new-tokens", "1"], input=stdin)

    marked, plain = prompts("\ufeffhi\n".encode()), prompts(b"hi\n")
    assert marked.exit_code == 0 and '"prompt_token_ids"' in marked.stdout
    ids = [result.stdout.partition('"prompt_token_ids": ')[2].partition("]")[0] for result in (marked, plain)]
    assert ids[0] == ids[1]
    refused = prompts("诗写一首\n".encode("gb18030"))
    assert refused.exit_code == 1 and "belle-run: input: it cannot be read: found byte 0x" in refused.stderr
    half = CliRunner().invoke(main, [engine, "a\udcca", "--max-new-tokens", "1"])
    assert half.exit_code == 1 and "the prompt: found half of a surrogate pair (U+DCCA) as character 1" in half.stderr
