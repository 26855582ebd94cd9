"""The command line of belle-run scale-out and the arguments of its application."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.scale_out.cli import command
from belle_compile.runtime.scale_out.options import Arguments, ScaleOutOptions

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(("text", "bounds"), [("1", (1, 1)), ("3", (3, 3)), ("2-8", (2, 8))])
def test_replicas(text: str, bounds: tuple[int, int]) -> None:
    assert ScaleOutOptions(replicas=text).bounds == bounds


@pytest.mark.parametrize("text", ["0", "3-2", "0-2", "", "a", "1-", "-1", "1-2-3", "1.5"])
def test_replicas_that_do_not_fit(text: str) -> None:
    with pytest.raises(EngineError, match="scale-out: replicas"):
        ScaleOutOptions(replicas=text)


def test_arguments_of_a_configuration_file() -> None:
    arguments = Arguments.from_plain(
        {"engine": "/e", "serve": ["--drain-timeout", "7"], "options": {"replicas": "2-4", "gpus": 1}}
    )
    assert arguments == Arguments("/e", ("--drain-timeout", "7"), ScaleOutOptions(replicas="2-4", gpus=1.0))
    assert arguments.server_options().drain_timeout_s == 7
    assert Arguments.from_plain({"engine": "/e"}) == Arguments("/e", (), ScaleOutOptions())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "field engine does not fit: found nothing"),
        ({"engine": "/e", "more": 1}, "field more does not fit: found an unknown field"),
        ({"engine": "/e", "options": {"cpu": 1}}, "field options.cpu does not fit: found an unknown field"),
        ({"engine": "/e", "options": {"cpus": "1"}}, 'field options.cpus does not fit: found "1", expected a number'),
        ({"engine": "/e", "options": {"cpus": -1}}, "cpus: found -1.0"),
        ({"engine": "/e", "serve": "--x"}, "field serve does not fit"),
        ({"engine": "/e", "serve": ["--none"]}, "No such option"),
        ({"engine": "/e", "serve": ["--max-queue", "-1"]}, "max-queue: found -1"),
        ({"engine": "/e", "serve": ["--help"]}, "options of a server"),
        ([], "expected an object"),
    ],
)
def test_arguments_that_do_not_fit(value: Any, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        Arguments.from_plain(value)


@pytest.mark.parametrize(
    "given",
    [("--port", "1"), ("--host", "::"), ("--uds", "s"), ("--admin-key", "k"), ("--metrics-auth",), ("--allow-lora-updates",)],
)
def test_options_of_one_server_are_not_passed_on(given: tuple[str, ...]) -> None:
    with pytest.raises(EngineError, match=f"found {given[0]}, expected options that fit every replica"):
        Arguments("/e", given, ScaleOutOptions())


def test_help_names_every_option() -> None:
    shown = CliRunner().invoke(command(), ["--help"]).output
    for name in ("--replicas", "--target-queue-time", "--max-requests", "--affinity-chars", "--cpus", "--gpus", "--address"):
        assert name in shown
    assert "SERVE_OPTIONS" in shown


def test_without_ray_it_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['ray'] = None; sys.argv = ['belle-run', 'scale-out', 'engine']\n"
        "from belle_compile.runtime.cli import main; main(prog_name='belle-run')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "belle-run: scale-out: belle-run scale-out needs packages that are not installed: found no ray.serve; "
        "pip install -c constraints.txt '.[ray]'."
    )
