"""What all tests share: golden texts, Triton kernels that are interpreted, and kernels for CPUs that are compiled once."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kernel_cache import FOLDER

# Read when kernels are imported. Tests that compile them do so in processes of their own.
os.environ["TRITON_INTERPRET"] = "1"
# Workers share the cores, and so do the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

GOLDEN = Path(__file__).parent / "golden"
WORKER = "PYTEST_XDIST_WORKER"


def pytest_configure(config: pytest.Config) -> None:
    if WORKER not in os.environ:  # workers have this one's environment
        os.environ[FOLDER] = tempfile.mkdtemp(prefix="belle-test-kernels-")


def pytest_unconfigure(config: pytest.Config) -> None:
    if WORKER not in os.environ:
        shutil.rmtree(os.environ.pop(FOLDER), ignore_errors=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write tests/golden/*.txt from what the tests produce")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """golden(name, text) compares a text with tests/golden/<name>.txt, or writes it with --update-golden."""

    def compare(name: str, text: str) -> None:
        path = GOLDEN / f"{name}.txt"
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.is_file(), f"{path} is missing: run pytest --update-golden and look at what it wrote"
        assert text == path.read_text(encoding="utf-8"), f"{path} differs: if the new text is right, run pytest --update-golden"

    return compare
