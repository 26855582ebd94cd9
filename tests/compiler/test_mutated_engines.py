"""Engines whose files were changed and digested again: a changed value ends in one sentence, never in a crash."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tvm")

from tests.checkouts import ROOT

MUTATIONS = 240


@pytest.fixture
def engine(built: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(built, tmp_path / "engine"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from belle_compile.compiler.driver import BuildRequest, build
    from belle_compile.runtime import host
    from tests.parity.variants import make_llama

    if "avx2" not in host.host_isas():
        pytest.skip("needs AVX2")
    checkpoint = tmp_path_factory.mktemp("checkpoint")
    make_llama(checkpoint)
    return build(BuildRequest(str(checkpoint), tmp_path_factory.mktemp("out") / "engine", isas=("avx2",), drift=False))


def ends(engine: Path, name: str, count: int) -> list[tuple[int, str, list[str | int], str]]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.compiler.mutations", str(engine), name, str(count)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"the process ended with {done.returncode} after {lines[-1:]}: {done.stderr[-500:]}"
    return lines


def test_a_changed_program_is_refused(engine: Path) -> None:
    lines = ends(engine, "rank0/program.json", MUTATIONS)
    assert len(lines) == MUTATIONS
    others = [line for line in lines if line[3] != "refused"]
    assert not others, "kernels are sealed for one program"


@pytest.mark.parametrize("name", ["tokenizer.json", "manifest.json"])
def test_a_changed_file_gives_no_traceback(engine: Path, name: str) -> None:
    lines = ends(engine, name, MUTATIONS)
    assert not [line for line in lines if line[3] not in ("refused", "answered")]
