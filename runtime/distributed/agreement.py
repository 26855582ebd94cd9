"""The check of loaded ranks that they belong to one engine, and their agreement on what they serve together.

Each rank sends rank 0 a report, or the error that kept it from loading. Rank 0 judges the reports and sends its verdict to all
ranks, so that one error is shown and every rank ends.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from belle_compile.runtime.distributed.collectives import Collectives
from belle_compile.runtime.errors import BelleError, EngineError
from belle_compile.runtime.executors.base import RankExecutor

_SAME = ("digest", "vocabulary", "sums")  # fields of a report that all ranks must have in common


@dataclass(frozen=True)
class Report:
    """A rank that is loaded: its manifest's digest, the `span` (first token, count) of its logits, blocks of its KV cache, the
    model's vocabulary, its sums over ranks (rows, width) in the order of a step, and its executor's `kernels`."""

    digest: str
    span: tuple[int, int]
    blocks: int
    vocabulary: int
    sums: tuple[tuple[str, int], ...]
    kernels: str

    @classmethod
    def of(cls, digest: str, executor: RankExecutor) -> Report:
        """The report of an executor."""
        sums = tuple(executor.sums)
        return cls(digest, executor.span, executor.num_blocks, executor.vocab_size, sums, executor.kernels)


@dataclass(frozen=True)
class Agreement:
    """What all ranks serve together: their `spans` and `kernels` in order, and as many KV `blocks` as the rank with the fewest
    has."""

    spans: tuple[tuple[int, int], ...]
    blocks: int
    kernels: tuple[str, ...]


def agree(report: Report, collectives: Collectives, timeout_s: float) -> Agreement:
    """Exchange reports with the ranks that are ready within `timeout_s` seconds.

    Where they do not fit, rank 0 raises `EngineError` with the first reason, and the other ranks end with exit code 1.
    """
    verdict = _verdict(asdict(report), collectives, timeout_s)
    if "error" in verdict:
        _end(verdict, collectives)
    spans = tuple((first, count) for first, count in verdict["spans"])
    return Agreement(spans, verdict["blocks"], tuple(verdict["kernels"]))


def refuse(error: BelleError, collectives: Collectives, timeout_s: float) -> NoReturn:
    """Replace `agree` on a rank that could not be loaded: all ranks end as described there, with the error of one of them."""
    _end(_verdict({"error": error_fields(error)}, collectives, timeout_s), collectives)


def _verdict(report: dict[str, Any], collectives: Collectives, timeout_s: float) -> dict[str, Any]:
    """Send this rank's report, or its error, to rank 0; return rank 0's verdict on all."""
    verdict: dict[str, Any] = json.loads(
        collectives.agree(json.dumps(report).encode(), judge(collectives.ranks, timeout_s), timeout_s)
    )
    return verdict


def _end(verdict: dict[str, Any], collectives: Collectives) -> NoReturn:
    # If a rank is absent, rank 0 ends all of them once its error is shown. Where exit codes differ, Hydra returns any of them.
    if collectives.rank or verdict["all"]:
        collectives.close()
    if collectives.rank:
        sys.exit(1)
    raise EngineError(**verdict["error"])


def judge(count: int, timeout_s: float) -> Callable[[dict[int, bytes]], bytes]:
    """The function by which rank 0 makes a verdict of the reports of `count` ranks (rank -> JSON) that came in time.

    A verdict is JSON: `all`, whether every rank sent a report, and the fields of an `Agreement`, or `error` with those of an
    `EngineError`.
    """

    def verdict_on(received: dict[int, bytes]) -> bytes:
        reports = {rank: json.loads(text) for rank, text in received.items()}
        verdict = {"all": len(reports) == count}
        try:
            return json.dumps(verdict | _agreement(reports, count, timeout_s)).encode()
        except EngineError as error:
            return json.dumps(verdict | {"error": error_fields(error)}).encode()

    return verdict_on


def _agreement(reports: dict[int, dict[str, Any]], count: int, timeout_s: float) -> dict[str, Any]:
    """The fields of the `Agreement`; raises `EngineError` for the first thing that does not fit."""
    for rank in sorted(reports):
        if "error" in reports[rank]:
            raise EngineError(**reports[rank]["error"])
    absent = [rank for rank in range(count) if rank not in reports]
    if absent:
        names = f"rank{'s' * (len(absent) > 1)} {', '.join(map(str, absent))}"
        remedy = "look at what holds it up, or give it more time with --rank-timeout"
        raise EngineError("ranks", f"{names} did not get ready", found=f"nothing within {timeout_s:g} s", remedy=remedy)
    for rank in range(1, count):
        for field in _SAME:
            if reports[rank][field] != reports[0][field]:
                found, expected = (f"{field} {str(reports[i][field])[:16]} on rank {i}" for i in (rank, 0))
                remedy = "give all ranks copies of the same engine"
                raise EngineError("ranks", "they have different engines", found=found, expected=expected, remedy=remedy)
    spans, end = [reports[rank]["span"] for rank in range(count)], 0
    for first, size in spans:
        if first != end:
            raise EngineError("ranks", "parts of the vocabulary", found=f"one from {first} on", expected=f"one from {end} on")
        end += size
    vocabulary = reports[0]["vocabulary"]
    if end != vocabulary:
        raise EngineError("ranks", "parts of the vocabulary", found=f"{end} tokens", expected=str(vocabulary))
    kernels = [reports[rank]["kernels"] for rank in range(count)]
    return {"spans": spans, "blocks": min(report["blocks"] for report in reports.values()), "kernels": kernels}


def error_fields(error: BelleError) -> dict[str, str]:
    """The arguments that make the same error in another process."""
    return {name: getattr(error, name) for name in ("stage", "what", "found", "expected", "remedy", "node")}
