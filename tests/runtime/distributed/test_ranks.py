"""What processes learn from those who start them."""

from __future__ import annotations

import pytest

from belle_compile.runtime.distributed import ranks
from belle_compile.runtime.errors import EngineError


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, ranks.Place(1, 2)),
        ({"PMI_RANK": "0", "PMI_SIZE": "1"}, None),
        ({"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"}, ranks.Place(3, 4)),
        ({"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4"}, ranks.Place(2, 4)),
        ({"SLURM_PROCID": "0"}, None),  # a batch script
        ({"PMI_RANK": "x", "PMI_SIZE": "2"}, None),
    ],
)
def test_place(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: ranks.Place | None) -> None:
    for names in ranks.PLACES:
        for name in names:
            monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert ranks.place() == expected


def test_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ranks.TIMEOUT, raising=False)
    assert ranks.timeout_s() == 10
    monkeypatch.setenv(ranks.TIMEOUT, "2.5")
    assert ranks.timeout_s() == 2.5
    monkeypatch.setenv(ranks.TIMEOUT, "soon")
    with pytest.raises(EngineError, match="BELLE_RANK_TIMEOUT: found 'soon', expected seconds"):
        ranks.timeout_s()
