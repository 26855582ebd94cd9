"""belle-run benchmark: measures how much an engine serves on this host, for limits of latency and for plans."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from belle_compile.runtime.cli import options
from belle_compile.runtime.options_file import config_option, name_variables
from belle_compile.runtime.usage import json_option, version_option

if TYPE_CHECKING:
    from belle_compile.runtime.capacity.curve import Level

_EPILOG = """
\b
Examples:
  belle-run benchmark artifacts/belle-7b-cpu
  belle-run benchmark artifacts/belle-7b-cpu --input-tokens 512 --output-tokens 128 --seconds 300
  belle-run serve artifacts/belle-7b-cpu --slo-ttft 0.8 --slo-tpot 0.05
"""
_COLUMNS = ("users", "tokens/s", "requests/s", "first token, s", "p99", "ms a token", "p99", "request, s", "p99", "busy")
_WIDTHS = (5, 8, 10, 14, 8, 10, 8, 10, 8, 5)


@cache  # the decorators of `_benchmark` hand their options over once
def command() -> click.Command:
    """The command `belle-run benchmark`."""
    decorated = click.command(
        "benchmark", epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
    )(_benchmark)
    decorated.params += [config_option("options"), version_option()]
    name_variables(decorated, "BELLE_BENCHMARK")
    return decorated


@options.engine
@click.option("--seconds", type=click.FloatRange(min=1), default=120.0, show_default=True, help="Time of the measurement.")
@click.option("--input-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Tokens of a prompt.")
@click.option("--output-tokens", type=click.IntRange(min=2), default=64, show_default=True, help="Tokens of an answer.")
@click.option("--max-users", type=click.IntRange(min=1), help="Requests under way, at most.  [default: the engine's most]")
@click.option("-o", "--output", type=options.PATH, metavar="FILE", help="Where to store it.  [default: ENGINE/capacity.json]")
@options.loading
@json_option("Print what is stored as one JSON object, and the error of a command that fails.")
def _benchmark(engine: Path, **given: Any) -> None:
    """Measure how much the engine in directory ENGINE serves on this host: rates and latencies over the number of users.

    Each of so many users sends a prompt, waits for its answer and sends the next one. Nothing else should run meanwhile. What
    is stored is used by belle-run serve --slo-ttft and --slo-tpot, and shown by belle-compile plan --measured.
    """
    options.check_engine(engine)
    from belle_compile.runtime.distributed.command import run_command

    code = run_command(
        engine,
        lambda: _measure(engine, given),
        ranks_requested=given["count"],
        rank_timeout_s=given["rank_timeout"],
        as_json=given["as_json"],
    )
    sys.exit(code)


def _measure(directory: Path, given: dict[str, Any]) -> int:
    from belle_compile.runtime import host
    from belle_compile.runtime.capacity.curve import CAPACITY_NAME, write_capacity
    from belle_compile.runtime.capacity.measure import Plan, Watch, measure
    from belle_compile.runtime.engine import Engine

    watch, shown = Watch(), not given["as_json"]
    plan = Plan(given["seconds"], given["input_tokens"], given["output_tokens"], given["max_users"])
    threads = given["threads"] or len(host.usable_cores())
    with Engine.load(directory, telemetry=watch, **options.load_arguments(given)) as engine:
        if shown:
            click.echo(_line(_COLUMNS))
        capacity = measure(engine, watch, threads, plan, _show if shown else lambda level: None)
    path = given["output"] or directory / CAPACITY_NAME
    write_capacity(capacity, path)
    if shown:
        click.echo(f"prompts: {capacity.prompt_tokens_per_s:,.0f} tokens/s; stored in {path}")
    else:
        click.echo(capacity.to_text(), nl=False)
    return 0


def _show(level: Level) -> None:
    first, token, request = level.first_token_s, level.token_s, level.request_s
    latencies = [f"{value:.3f}" for value in (first.p50, first.p99)]
    latencies += [f"{1e3 * value:.2f}" for value in (token.p50, token.p99)]
    latencies += [f"{value:.2f}" for value in (request.p50, request.p99)]
    rates = (f"{level.tokens_per_s:,.1f}", f"{level.requests_per_s:.2f}")
    click.echo(_line((str(level.users), *rates, *latencies, f"{100 * level.busy:.0f}%")))


def _line(cells: tuple[str, ...]) -> str:
    return "  ".join(cell.rjust(width) for cell, width in zip(cells, _WIDTHS, strict=True))
