"""One set of engines for the tests of this folder."""

from __future__ import annotations

import pytest

from tests.compiler.backends.torchscript.harness import Engines


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    return Engines(tmp_path_factory.mktemp("torchscript"))
