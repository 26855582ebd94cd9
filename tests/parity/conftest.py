"""One builder for all parity tests of a session."""

from __future__ import annotations

import pytest

from tests.parity.engines import Builder


@pytest.fixture(scope="session")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    """Makes checkpoints and engines of the variants, each once."""
    return Builder(tmp_path_factory.mktemp("parity"))
