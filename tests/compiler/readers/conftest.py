"""Fixtures of the tests of readers with damaged and hostile files."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.compiler.checkpoint.models import write_llama
from tests.compiler.readers.runs import Runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    directory = tmp_path_factory.mktemp("first")
    requests = directory / "requests.jsonl"
    requests.write_text('{"text": "one request"}\n' * 3, encoding="utf-8")
    process = Runs(write_llama(directory / "llama"), requests)
    yield process
    process.close()
