"""The options of belle-run scale-out, and what it lets the options of belle-run serve be."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import click
from click.core import ParameterSource

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.schema import from_plain, refuse_from, to_plain
from belle_compile.runtime.server import cli as server_cli
from belle_compile.runtime.server.options import ServerOptions, check_ranges, option

STAGE = "scale-out"
# Of belle-run serve: those that scale-out decides itself, and those for one server alone, which clients of many cannot name.
_NOT_PASSED = (
    "host", "port", "uds", "ssl_certfile", "ssl_keyfile", "root_path", "metrics_auth", "admin_key", "allow_lora_updates",
)  # fmt: skip


@dataclass(frozen=True)
class ScaleOutOptions:
    """How replicas are run, and how requests find them."""

    replicas: str = option("1", "Replicas of the engine, or how few and how many there may be.", metavar="N|MIN-MAX")
    target_queue_time_s: float = option(
        0.5, "Seconds that requests may wait for their first step before there are more replicas.", metavar="S", above=0
    )
    upscale_delay_s: float = option(10.0, "Seconds that they wait longer before replicas are added.", metavar="S", least=0)
    downscale_delay_s: float = option(
        300.0, "Seconds that replicas are idle enough before one is taken away.", metavar="S", least=0
    )
    max_requests: int = option(
        32, "Requests that a replica has at a time, at most; more of them go to another one, and wait if all have as many.",
        least=1,
    )  # fmt: skip
    affinity_chars: int = option(
        512, "Characters of a prompt, in chats of the first user message, that choose its replica.", least=1
    )
    cpus: float = option(1.0, "CPUs that a replica reserves in Ray.", least=0)
    gpus: float = option(0.0, "GPUs that a replica reserves in Ray.", least=0)
    ingresses: int = option(1, "Processes that take requests over HTTP and choose their replicas.", least=1)
    start_timeout_s: float = option(600.0, "Seconds that a replica has to get ready.", metavar="S", above=0)

    def __post_init__(self) -> None:
        """Raise `EngineError` for a value outside of its range."""
        check_ranges(self)
        least, most = self.bounds
        if not 1 <= least <= most:
            raise EngineError(STAGE, "replicas", found=repr(self.replicas), expected="at least 1, and MIN not above MAX")

    @property
    def bounds(self) -> tuple[int, int]:
        """The smallest and the largest number of replicas."""
        match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", self.replicas)
        if not match:
            raise EngineError(STAGE, "replicas", found=repr(self.replicas), expected="a number, or two such as 2-8")
        return int(match[1]), int(match[2] or match[1])


@dataclass(frozen=True)
class Arguments:
    """What an application is made of.

    `engine` is its directory on the hosts of the replicas, `serve` the options of `belle-run serve` as on its command line.
    """

    engine: str
    serve: tuple[str, ...]
    options: ScaleOutOptions

    def __post_init__(self) -> None:
        """Raise `EngineError` for options of `belle-run serve` that are not to be given, or do not fit."""
        self.server_options()

    @classmethod
    def from_plain(cls, value: Any) -> Arguments:
        """Make them from the arguments of a Serve configuration file; what is left out of `options` has its default."""
        refuse = refuse_from(STAGE, "see docs/deploy.md")
        if isinstance(value, dict):
            options = value.get("options", {})
            value = {"serve": [], **value}
            if isinstance(options, dict):
                value["options"] = to_plain(ScaleOutOptions()) | options
        return from_plain(cls, value, refuse)

    def server_options(self) -> ServerOptions:
        """The options of the server of each replica."""
        return parse_serve(self.engine, self.serve)


def parse_serve(engine: str, serve: Sequence[str]) -> ServerOptions:
    """Return the server's options among those that replicas are started with; raises `EngineError` where they do not fit."""
    try:
        context = server_cli.command().make_context("belle-run serve", [engine, *serve], resilient_parsing=False)
    except click.exceptions.Exit:  # by --help or --version
        raise EngineError(STAGE, "options for belle-run serve", found=" ".join(serve), expected="options of a server") from None
    except click.ClickException as error:
        raise EngineError(STAGE, "options for belle-run serve", found=error.format_message()) from None
    for name in _NOT_PASSED:
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
            given = f"--{name.replace('_', '-')}"
            raise EngineError(STAGE, "options for belle-run serve", found=given, expected="options that fit every replica")
    server, _ = server_cli.records(context.params)
    return server
