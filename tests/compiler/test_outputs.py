"""belle-compile with an output that is closed, full or left by its reader: one sentence, a code, and nothing half done."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from belle_compile.compiler import cli, inspection
from belle_compile.runtime.artifact import read_manifest
from tests.checkouts import ROOT
from tests.compiler.engines import write_engine

_CLOSED = "belle-compile: the output cannot be written: found that it is closed.\n"
_FULL = "belle-compile: the output cannot be written: found No space left on device.\n"
# Runs each command line in a fork of a process that has imported what they need, with the streams that a shell would give them.
# A build takes the engine that is there, since what is tested comes after it.
_EACH = """
    import json, os, sys, types
    from pathlib import Path
    import belle_compile.compiler as compiler
    from belle_compile.compiler import cli, inspection
    compiler.driver = sys.modules["belle_compile.compiler.driver"] = types.ModuleType("driver")
    compiler.driver.build = lambda request: Path("engine")
    for arguments, redirects in json.loads(sys.argv[1]):
        errors, child = os.memfd_create("errors"), os.fork()
        if not child:
            sys.stderr.flush()
            os.dup2(errors, 2)
            for stream, where in redirects:
                os.close(stream)
                if where == "left":
                    reader, writer = os.pipe()
                    os.close(reader)
                    os.dup2(writer, stream)
                elif where:
                    os.dup2(os.open(where, os.O_WRONLY), stream)
                setattr(sys, {1: "stdout", 2: "stderr"}[stream], open(stream, "w", closefd=False) if where else None)
            cli.main(arguments)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps([code, os.pread(errors, 1 << 16, 0).decode()]), file=sys.stderr)
"""
_COMMANDS = [
    ["targets"],
    ["targets", "--json"],
    ["inspect", "engine"],
    ["inspect", "engine", "--json"],
    ["build", "checkpoint", "-o", "new"],
    ["build", "checkpoint", "-o", "new", "--json", "--quiet"],
    ["edit", "engine", "--generation-defaults", "top_k=3"],
    ["--help"],
    ["build", "--help"],
    ["--version"],
]  # fmt: skip


@pytest.fixture
def places(tmp_path: Path) -> Path:
    """A directory with an engine and a checkpoint without content."""
    write_engine(tmp_path / "engine")
    (tmp_path / "checkpoint").mkdir()
    return tmp_path


def run(places: Path, *commands: tuple[list[str], list[tuple[int, str]]]) -> list[tuple[int, str]]:
    """Exit codes and errors of commands, each with streams in place of its own: a number and where it goes ("": closed)."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_EACH), json.dumps(commands)], cwd=places, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout == "", done
    return [(code, errors) for code, errors in map(json.loads, done.stderr.splitlines())]


def test_a_full_output_is_one_sentence(places: Path) -> None:
    outcomes = run(places, *((arguments, [(1, "/dev/full")]) for arguments in _COMMANDS))
    assert dict(zip(map(" ".join, _COMMANDS), outcomes, strict=True)) == {" ".join(words): (1, _FULL) for words in _COMMANDS}
    inspection.verify(places / "engine")  # what was made is whole


def test_with_a_closed_output_nothing_is_begun(places: Path) -> None:
    before = read_manifest(places / "engine").digest
    outcomes = run(places, *((arguments, [(1, "")]) for arguments in _COMMANDS), (_COMMANDS[0], [(1, ""), (2, "")]))
    assert outcomes == [(1, _CLOSED)] * len(_COMMANDS) + [(1, "")]
    assert read_manifest(places / "engine").digest == before


def test_a_reader_that_leaves_is_told_nothing(places: Path) -> None:
    assert run(places, *((arguments, [(1, "left")]) for arguments in _COMMANDS)) == [(1, "")] * len(_COMMANDS)
    inspection.verify(places / "engine")


def test_errors_that_cannot_be_written_end_a_command(places: Path) -> None:
    outcomes = run(places, *((words, [(2, "/dev/full")]) for words in (["inspect", "missing"], ["inspect"], ["edit"])))
    assert all(code and not errors for code, errors in outcomes)


def test_a_full_disk_is_no_fault_of_the_output(
    places: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")  # as writing to an open file raises it

    monkeypatch.setattr(inspection, "inspect", full)
    with pytest.raises(SystemExit) as end:
        cli.main(["inspect", str(places / "engine"), "--json"])
    out, errors = capsys.readouterr()
    assert end.value.code == 1 and errors == "belle-compile: file: No space left on device.\n"
    assert json.loads(out)["error"]["stage"] == "file"
