"""The curve of an engine on a host, as `belle-run benchmark` stores it, and what follows from it for limits of latency."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from belle_compile.runtime import host
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.schema import canonical_json, from_plain, parse_json, refuse_from, to_plain
from belle_compile.runtime.serving.scheduling import FirstTokenLimit

CAPACITY_NAME = "capacity.json"  # beside the manifest, which does not list it: it belongs to a host
FORMAT_VERSION = 1
STAGE = "capacity"
_REMEDY = "measure it with belle-run benchmark"


@dataclass(frozen=True)
class Latency:
    """The median and the 99th percentile of a time, in seconds."""

    p50: float
    p99: float


@dataclass(frozen=True)
class Level:
    """What was measured while `users` requests were under way all the time.

    `requests` have ended in `seconds`. `tokens_per_s` counts tokens of answers. `first_token_s` runs from a request's arrival
    to its first token, `token_s` is the mean time between the tokens of an answer, `request_s` runs from its arrival to its
    end. `busy` is the share of the time in which a step ran.
    """

    users: int
    requests: int
    seconds: float
    requests_per_s: float
    tokens_per_s: float
    first_token_s: Latency
    token_s: Latency
    request_s: Latency
    busy: float


@dataclass(frozen=True)
class Capacity:
    """The curve of one engine on one host.

    `engine` is the manifest's digest, `host` and `threads` say where it was measured. Prompts of `prompt_tokens` were answered
    with `answer_tokens`; prompts alone are computed at `prompt_tokens_per_s`. `levels` are in order of their users.
    """

    engine: str
    kernels: str
    host: str
    threads: int
    version: str
    date: str
    prompt_tokens: int
    answer_tokens: int
    prompt_tokens_per_s: float
    levels: tuple[Level, ...]
    format_version: int = FORMAT_VERSION

    def to_text(self) -> str:
        """The text of the file."""
        return canonical_json(to_plain(self))

    def most_sequences(self, token_s: float) -> int:
        """The most answers that may be generated at the same time so that the 99th percentile of the mean time between their
        tokens stays within `token_s`; between measured levels, on the straight line through them. Raises `EngineError` where
        one answer alone takes longer."""
        first = self.levels[0]
        if first.token_s.p99 > token_s:
            found = f"{1e3 * first.token_s.p99:.1f} ms a token with {_users(first)}"
            expected = f"at most {1e3 * token_s:g}"
            raise EngineError(STAGE, "slo-tpot cannot be kept on this host", found=found, expected=expected, remedy="raise it")
        within = first
        for level in self.levels[1:]:
            if level.token_s.p99 > token_s:
                share = (token_s - within.token_s.p99) / (level.token_s.p99 - within.token_s.p99)
                return within.users + int(share * (level.users - within.users) + 1e-9)
            within = level
        return within.users

    def first_token_limit(self, first_token_s: float, sequences: int) -> FirstTokenLimit:
        """The limit of a scheduler that runs so many sequences at a time; raises `EngineError` where a prompt of the measured
        length takes longer alone."""
        first = self.levels[0]
        if first.first_token_s.p50 > first_token_s:
            found = f"{first.first_token_s.p50:.2f} s to the first token with {_users(first)} and {self.prompt_tokens} tokens"
            expected = f"at most {first_token_s:g} s"
            raise EngineError(STAGE, "slo-ttft cannot be kept on this host", found=found, expected=expected, remedy="raise it")
        level = min(self.levels, key=lambda level: (abs(level.users - sequences), level.users))
        return FirstTokenLimit(first_token_s, self.prompt_tokens_per_s, 1 / level.requests_per_s)


def describe_host() -> str:
    """What of a host a curve depends on: its processor and the cores that this process may use."""
    return f"{host.processor_name()}, {len(host.usable_cores())} cores"


def read_capacity(path: Path) -> Capacity:
    """Read a curve; raises `EngineError` for a file that is missing or does not fit."""
    refuse = refuse_from(f"{STAGE} {path}", _REMEDY)
    try:
        plain = parse_json(path.read_bytes())
    except OSError as error:
        what = f"{path} cannot be read"
        raise EngineError(STAGE, what, found=error.strerror or str(error), remedy=_REMEDY) from None
    except ValueError as error:
        raise EngineError(STAGE, f"{path} is no JSON", found=str(error), remedy=_REMEDY) from None
    capacity = from_plain(Capacity, plain, refuse)
    if capacity.format_version != FORMAT_VERSION:
        raise refuse("format_version", str(capacity.format_version), str(FORMAT_VERSION))
    users = [level.users for level in capacity.levels]
    if not users or users[0] < 1 or users != sorted(set(users)):
        raise refuse("levels", f"users {', '.join(map(str, users)) or 'of no level'}", "at least one, each with more users")
    rates = [capacity.prompt_tokens_per_s, *(level.requests_per_s for level in capacity.levels)]
    if min(rates) <= 0:
        raise refuse("requests_per_s", str(min(rates)), "rates above 0")
    return capacity


def check_capacity(capacity: Capacity, path: Path, digest: str, threads: int) -> None:
    """Raise `EngineError` where a curve was measured of another engine, on another host or with another number of threads."""
    here = describe_host()
    for what, found, expected in (
        ("engine", f"{capacity.engine[:12]}…", f"{digest[:12]}…"), ("host", capacity.host, here),
        ("number of threads", str(capacity.threads), str(threads)),
    ):  # fmt: skip
        if found != expected:
            raise EngineError(STAGE, f"{path} was measured for another {what}", found=found, expected=expected, remedy=_REMEDY)


def write_capacity(capacity: Capacity, path: Path) -> None:
    """Write a curve; the file appears whole or not at all. Raises `EngineError` where it cannot be written."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(capacity.to_text(), encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        remedy = "give another place with -o FILE, and to belle-run serve with --capacity FILE"
        raise EngineError(STAGE, f"{path} cannot be written", found=error.strerror or str(error), remedy=remedy) from None


def _users(level: Level) -> str:
    return "1 user" if level.users == 1 else f"{level.users} users"
