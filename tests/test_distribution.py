"""The wheel installs one package, which runs beside a user's own modules named compiler, passes and runtime."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from belle_compile import __version__
from tests.checkouts import copy_checkout

USERS_PROGRAM = """
import compiler, passes, runtime
from belle_compile import Engine, EngineError, SamplingParams
import belle_compile.passes, belle_compile.runtime.cli
print(compiler.OWNER, passes.OWNER, runtime.OWNER, belle_compile.__file__, SamplingParams(temperature=0).temperature)
try:
    Engine.load("nowhere")
except EngineError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The wheel of a clean checkout, and the files of that."""
    folder, checkout = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("checkout")
    names = copy_checkout(checkout)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps", "-w", str(folder)]
    subprocess.run([*command, str(checkout)], check=True, capture_output=True, text=True, timeout=300)
    return next(folder.glob("*.whl")), names


def test_a_wheel_holds_one_package_and_its_data(built: tuple[Path, list[str]]) -> None:
    wheel, tracked = built
    information = f"belle_compile-{__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"{information}/METADATA").decode()
    assert {name.split("/")[0] for name in names} == {"belle_compile", information}
    packaged = re.compile(r"(compiler|passes|runtime)/(.*/)?([^/]+\.(py|jinja|json|c|h|html|css|js|svg)|py\.typed)")
    expected = {f"belle_compile/{path}" for path in tracked if packaged.fullmatch(path)}
    expected |= {"belle_compile/__init__.py", "belle_compile/py.typed"}
    assert {name for name in names if name.startswith("belle_compile/")} == expected
    assert "License-Expression: Apache-2.0" in metadata and f"Version: {__version__}" in metadata
    assert f"{information}/licenses/LICENSE" in names


def test_beside_a_users_own_modules(built: tuple[Path, list[str]], tmp_path: Path) -> None:
    site, project = tmp_path / "site", tmp_path / "project"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--target"]
    subprocess.run([*command, str(site), str(built[0])], check=True, capture_output=True, text=True, timeout=300)
    assert sorted(path.name for path in site.iterdir() if not path.name.endswith(".dist-info")) == ["belle_compile", "bin"]
    for package in ("compiler", "passes"):
        (project / package).mkdir(parents=True)
        (project / package / "__init__.py").write_text("OWNER = 'user'", encoding="utf-8")
    (project / "runtime.py").write_text("OWNER = 'user'", encoding="utf-8")
    (project / "program.py").write_text(USERS_PROGRAM, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "program.py"], cwd=project, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    owners, error = done.stdout.splitlines()
    assert owners == f"user user user {site / 'belle_compile' / '__init__.py'} 0"
    assert error.startswith("engine: nowhere is not an engine")
    for command_name in ("belle-compile", "belle-run"):
        said = subprocess.run(
            [sys.executable, str(site / "bin" / command_name), "--version"], cwd=project, env=environment,
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert said.stdout == f"{command_name}, version {__version__}\n", said.stderr
