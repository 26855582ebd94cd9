"""What ranks must agree on."""

from __future__ import annotations

import json
from typing import Any

import pytest

from belle_compile.runtime.distributed.agreement import judge
from belle_compile.runtime.errors import EngineError

GOOD: dict[int, dict[str, Any]] = {
    rank: {
        "digest": "d",
        "span": [100 * rank, 100],
        "blocks": 9 - rank,
        "vocabulary": 300,
        "sums": [["T", 64]],
        "kernels": f"kernels-{rank}",
    }
    for rank in range(3)
}


def judged(reports: dict[int, dict[str, Any]]) -> dict[str, Any]:
    verdict: dict[str, Any] = json.loads(judge(3, 4)({rank: json.dumps(report).encode() for rank, report in reports.items()}))
    return verdict


def test_ranks_that_fit() -> None:
    kernels = ["kernels-0", "kernels-1", "kernels-2"]
    assert judged(GOOD) == {"all": True, "spans": [[0, 100], [100, 100], [200, 100]], "blocks": 7, "kernels": kernels}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"digest": "e"},
            "ranks: they have different engines: found digest e on rank 1, expected digest d on rank 0; give",
        ),
        ({"sums": []}, "they have different engines: found sums [] on rank 1, expected sums [['T', 64]]"),
        ({"span": [90, 110]}, "ranks: parts of the vocabulary: found one from 90 on, expected one from 100 on."),
        ({"error": {"stage": "engine", "what": "weights", "found": "dust"}}, "engine: weights: found dust."),
    ],
)
def test_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    verdict = judged(GOOD | {1: GOOD[1] | change})
    assert verdict["all"] and message in str(EngineError(**verdict["error"]))


def test_parts_that_leave_tokens_out() -> None:
    verdict = judged(GOOD | {2: GOOD[2] | {"span": [200, 90]}})
    assert "found 290 tokens, expected 300" in str(EngineError(**verdict["error"]))


def test_ranks_that_say_nothing() -> None:
    verdict = judged({0: GOOD[0]})
    message = str(EngineError(**verdict["error"]))
    assert not verdict["all"] and message.startswith("ranks: ranks 1, 2 did not get ready: found nothing within 4 s; look at")
