"""Limits of latency that a server keeps, by the curve of its engine on its host."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from belle_compile.runtime import host
from belle_compile.runtime.artifact import read_manifest
from belle_compile.runtime.capacity.curve import CAPACITY_NAME, check_capacity, read_capacity
from belle_compile.runtime.serving.scheduling import SchedulerOptions


@dataclass(frozen=True)
class Slo:
    """The limits, in seconds, None for none: `first_token_s` from a request's arrival to its first token, `token_s` between the
    tokens of an answer (the mean of each, for 99 of 100 answers). `capacity` is the file of the curve, by default the one in
    the engine's directory."""

    first_token_s: float | None = None
    token_s: float | None = None
    capacity: Path | None = None


def limited(options: SchedulerOptions, slo: Slo | None, directory: Path, threads: int | None) -> SchedulerOptions:
    """Return the options of a scheduler that keeps the limits of `slo`, if there are any, for an engine that computes with so
    many threads (None: the usable cores). Raises `EngineError` without a curve that was measured here, and where one request
    alone takes longer."""
    if slo is None:
        return options
    path = slo.capacity or directory / CAPACITY_NAME
    capacity = read_capacity(path)
    check_capacity(capacity, path, read_manifest(directory).digest, threads or len(host.usable_cores()))
    most = options.max_num_seqs or capacity.levels[-1].users
    if slo.token_s is not None:
        most = min(most, capacity.most_sequences(slo.token_s))
    first_token = None if slo.first_token_s is None else capacity.first_token_limit(slo.first_token_s, most)
    return replace(options, max_num_seqs=options.max_num_seqs if slo.token_s is None else most, first_token=first_token)
