"""Progress of commands: lines where there is no terminal, bars where there is one, stages with their times, Ctrl-C."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from belle_compile.compiler.cli import progress
from belle_compile.compiler.cli.progress import NORMAL, QUIET, VERBOSE, Reporter, Run, Stage

ROOT = Path(__file__).parents[2]


def follow(run: Run) -> None:
    with run.following() as reporter:
        reporter("open")
        for done in range(4):
            reporter("digest", done, 3)


def test_stages_have_a_line_each_with_their_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    run = Run()
    follow(run)
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"belle-compile: open: \d+\.\d s\nbelle-compile: digest: \d+\.\d s\n", err)
    assert [stage["stage"] for stage in run.to_plain()["stages"]] == ["open", "digest"]
    assert all(stage.seconds > 0 and stage.peak_memory_bytes > 1 << 20 for stage in run.stages)
    assert run.peak_memory_bytes >= max(stage.peak_memory_bytes for stage in run.stages)


def test_verbose_adds_memory_and_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    follow(Run(verbosity=VERBOSE))
    assert re.search(r"digest: \d+\.\d s, with at most \d+\.\d [MG]B of memory\n", capsys.readouterr().err)
    follow(Run(verbosity=QUIET))
    assert capsys.readouterr() == ("", "")


def test_a_log_has_every_stage_even_if_quiet(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for _ in range(2):
        follow(Run(verbosity=QUIET, log=tmp_path / "log"))
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == 8, "a log is appended to"
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} (open|digest): ", line) for line in lines)
    assert capsys.readouterr().err == ""


def test_a_stage_that_takes_long_has_lines_in_between(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "FIRST_LINE_S", 0.0)
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    with Run().following() as reporter:
        reporter("calibrate", 3, 12)
        deadline = time.monotonic() + 20
        while not stderr.getvalue() and time.monotonic() < deadline:
            time.sleep(0.05)
    assert stderr.getvalue().startswith("belle-compile: calibrate: 3 of 12, ")


def test_a_stage_that_fails_has_no_line_of_success(capsys: pytest.CaptureFixture[str]) -> None:
    run = Run()
    with pytest.raises(ValueError), run.following() as reporter:
        reporter("open")
        raise ValueError
    assert capsys.readouterr().err == "" and run.stages[0].seconds > 0


def test_the_time_left_is_that_of_the_whole_stage() -> None:
    stage = Stage("calibrate", started=0.0)
    stage.advance(0, 100, 0.0)
    stage.advance(50, 100, 100.0)  # slow at first
    stage.advance(60, 100, 101.0)  # ten in the last second
    assert stage.left_s(101.0) == pytest.approx(101 * 40 / 60)
    assert stage.words(101.0) == "calibrate: 60 of 100, 101.0 s, about 67 s left"
    stage.advance(0, 40, 110.0)  # another pass that calibrates
    assert stage.left_s(112.0) is None, "nothing can be said yet"
    stage.advance(10, 40, 120.0)
    assert stage.left_s(120.0) == pytest.approx(30)


def test_a_stage_that_continues_is_estimated_from_where_it_began() -> None:
    stage = Stage("calibrate", started=0.0)
    stage.advance(80, 100, 0.0)
    stage.advance(90, 100, 90.0)
    assert stage.left_s(90.0) == pytest.approx(90)


def test_no_time_left_is_shown_for_short_stages() -> None:
    stage = Stage("digest", started=0.0)
    stage.advance(0, 100, 0.0)
    stage.advance(50, 100, 20.0)
    assert stage.left_s(20.0) is None and stage.words(20.0) == "digest: 50 of 100, 20.0 s"


@pytest.mark.parametrize("verbosity", [NORMAL, QUIET])
def test_ctrl_c_is_acknowledged_while_a_call_does_not_return(capsys: pytest.CaptureFixture[str], verbosity: int) -> None:
    before = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(before)
    run = Run(verbosity=verbosity)
    previous = signal.signal(signal.SIGINT, lambda number, frame: None)  # as native code that Python cannot stop
    try:
        with Reporter(run) as reporter:
            reporter("calibrate")
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert "belle-compile: Ctrl-C received in the stage calibrate: stopping as soon as" in capsys.readouterr().err
    after = signal.set_wakeup_fd(before)
    assert after == before


SCRIPT = """
    import time
    from belle_compile.compiler.cli.progress import Run
    with Run().following() as reporter:
        reporter("open")
        reporter("calibrate", 5, 10)
        time.sleep(0.3)
        reporter.say("a line above the bars")
        reporter("calibrate", 10, 10)
"""


def test_a_terminal_has_bars() -> None:
    parent, child = pty.openpty()
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT)]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    with subprocess.Popen(command, cwd=ROOT, stdin=child, stdout=child, stderr=child, env=environment) as process:
        os.close(child)
        text, deadline = b"", time.monotonic() + 30
        while time.monotonic() < deadline:
            if not select.select([parent], [], [], 1)[0]:
                continue
            try:
                text += os.read(parent, 4096)
            except OSError:  # the other end was closed
                break
        assert process.wait(timeout=30) == 0
    os.close(parent)
    assert b"open" in text and b"calibrate" in text and b"10/10" in text and b"a line above the bars" in text
    assert b"belle-compile: calibrate" not in text
