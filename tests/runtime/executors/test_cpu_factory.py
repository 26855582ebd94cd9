"""How many threads the executor of a CPU gets."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from belle_compile.runtime import host
from belle_compile.runtime.executors import cpu
from belle_compile.runtime.executors.cpu_factory import CpuFactory
from belle_compile.runtime.executors.factory import LoadRequest
from tests.runtime.fakes import manifest


@pytest.mark.parametrize(
    ("threads", "sharing", "rank", "given", "warning"),
    [
        (None, 1, 0, 4, ""),
        (4, 1, 0, 4, ""),
        (5, 1, 0, 5, "5 threads share 4 usable cores and will wait for each other; at most 4 are faster"),
        (64, 1, 0, 64, "64 threads share 4 usable cores and will wait for each other; at most 4 are faster"),
        (None, 2, 0, 2, ""),
        (2, 2, 1, 2, ""),
        (4, 2, 0, 4, "4 threads in each of 2 ranks share 4 usable cores and will wait for each other; at most 2 are faster"),
        (4, 2, 1, 4, ""),  # rank 0 has said so
        (None, 8, 0, 1, ""),
    ],
)
def test_threads_and_cores(
    threads: int | None, sharing: int, rank: int, given: int, warning: str,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(host, "usable_cores", lambda: [0, 2, 4, 6])
    monkeypatch.setattr(cpu, "CpuExecutor", lambda *_, **options: made.append(options))
    collectives: Any = SimpleNamespace(sharing=sharing, rank=rank) if sharing > 1 else None
    with caplog.at_level(logging.WARNING):
        CpuFactory().load(LoadRequest(Path("rank0"), manifest(), threads, collectives=collectives))
    assert made[0]["threads"] == given and [record.getMessage() for record in caplog.records] == ([warning] if warning else [])
