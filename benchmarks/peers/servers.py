"""The servers of servers.toml: how each is made ready, started and stopped."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from benchmarks.peers import convert
from benchmarks.peers.home import FOLDER, VENVS, PeersError
from benchmarks.peers.rows import Row
from benchmarks.servers import READY_S, ServerProcess

CONFIG = FOLDER / "servers.toml"
CONTEXT = 2048  # tokens of a chat, prompt and answer


@dataclass(frozen=True)
class ServerRow:
    """A server and its settings, as servers.toml has them."""

    name: str
    peer: str
    bits: float
    command: tuple[str, ...]
    ready: str
    format: str = ""
    environment: str = ""
    with_caches: tuple[str, ...] = ()
    without_caches: tuple[str, ...] = ()
    ready_s: float = READY_S
    variables: Mapping[str, str] = field(default_factory=dict)
    only_for: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    @property
    def row(self) -> Row:
        """What convert.py makes the engine of."""
        return Row(self.name, self.peer, self.bits, self.format, only_for=self.only_for, skip=self.skip)

    @property
    def venv(self) -> Path:
        """The folder that has the program, unless it is ours."""
        return VENVS / (self.environment or self.peer)

    @property
    def environments(self) -> tuple[str, ...]:
        """The environments that setup.sh makes for it: of its program, and of what makes its engine."""
        return () if self.row.is_ours else tuple(dict.fromkeys((self.peer, self.environment or self.peer)))

    def engine(self, checkpoint: Path) -> Path:
        """The engine that it serves, made where it is missing; raises PeersError where that fails."""
        if not self.row.is_ours and not (self.venv / "installed.txt").is_file():
            what = self.environment or self.peer
            raise PeersError(f"no complete environment {self.venv}: run benchmarks/peers/setup.sh {what}")
        return convert.prepare(self.row, checkpoint).engine

    def arguments(self, engine: Path, model: str, port: int, threads: int, users: int, *, caches: bool) -> list[str]:
        """The command line."""
        values = {
            "python": sys.executable, "venv": self.venv, "engine": engine.absolute(), "model": model, "port": port,
            "threads": threads, "users": users, "context": CONTEXT, "all_context": CONTEXT * users, "peers": FOLDER,
        }  # fmt: skip
        words = (*self.command, *(self.with_caches if caches else self.without_caches))
        return [word.format_map(values) for word in words]

    def start(self, engine: Path, model: str, threads: int, users: int, *, caches: bool, log: Path) -> ServerProcess:
        """Start it on a free port of the loopback interface; `wait` of what is returned waits until it is ready."""
        return ServerProcess(
            lambda port: self.arguments(engine, model, port, threads, users, caches=caches),
            model,
            ready=self.ready,
            ready_s=self.ready_s,
            environment=self.variables,
            log=log,
        )


def read_servers(config: Path = CONFIG) -> list[ServerRow]:
    """All servers of a configuration; raises PeersError where one is wrong."""
    try:
        toml: Any = importlib.import_module("tomllib")
    except ImportError:
        raise PeersError("comparisons of servers need Python 3.11 or later: run make with PYTHON=/path/to/python3") from None
    try:
        specs = toml.loads(config.read_text(encoding="utf-8")).get("server", [])
    except (OSError, toml.TOMLDecodeError) as error:
        raise PeersError(f"{config}: {error}") from error
    return [_server(spec, config) for spec in specs]


def _server(spec: dict[str, Any], config: Path) -> ServerRow:
    known = {each.name: each for each in fields(ServerRow)}
    name = spec.get("name", "without a name")
    if unknown := sorted(set(spec) - set(known)):
        raise PeersError(f"{config}: server {name!r}: unknown {', '.join(unknown)}; expected some of {', '.join(known)}")
    if missing := [key for key in ("name", "peer", "bits", "command", "ready") if key not in spec]:
        raise PeersError(f"{config}: server {name!r} has no {' and no '.join(missing)}")
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in spec.items()}
    return ServerRow(**values)


def choose(servers: Sequence[ServerRow], shape: str, only: Sequence[str] = ()) -> list[ServerRow]:
    """The servers for a shape: of these peers or names only, if any."""
    known = {word for server in servers for word in (server.name, server.peer)}
    if unknown := [word for word in only if word not in known]:
        raise PeersError(f"unknown {unknown}; peers and servers are {sorted(known)}")
    return [each for each in servers if each.row.fits(shape) and (not only or each.name in only or each.peer in only)]
