"""belle-run scale-out: its command line, which is made from the record of its options."""

from __future__ import annotations

import importlib
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import click

from belle_compile.runtime.errors import EngineError, install
from belle_compile.runtime.options_file import config_option, name_variables
from belle_compile.runtime.scale_out.options import STAGE, Arguments, ScaleOutOptions
from belle_compile.runtime.server.cli import click_option, record_of
from belle_compile.runtime.usage import version_option

_EXTRA = ("ray.serve", "aiohttp")
EPILOG = """
\b
What is behind -- goes to belle-run serve, by which each replica serves.
\b
Examples:
  belle-run scale-out artifacts/belle-7b-cpu --replicas 2
  belle-run scale-out /models/belle-7b-a100 --address auto --replicas 2-8 --gpus 1 \\
      -- --max-num-seqs 64 --result-cache redis://cache:6379/0
"""


def command() -> click.Command:
    """The command `belle-run scale-out`."""
    hints = get_type_hints(ScaleOutOptions)
    params: list[click.Parameter] = [
        click.Argument(["engine"], type=click.Path(path_type=Path)),
        click.Argument(["serve"], nargs=-1, type=click.UNPROCESSED, metavar="[-- SERVE_OPTIONS...]"),
        *(click_option(declared, hints[declared.name]) for declared in fields(ScaleOutOptions)),
        click.Option(["--address"], metavar="ADDRESS", help="Ray cluster, such as auto. By default one is started here."),
        click.Option(["--name"], default="belle", show_default=True, help="Name of the application in the cluster."),
        click.Option(["--host"], default="127.0.0.1", show_default=True, help="Address to listen on, on every node."),
        click.Option(["--port"], type=click.IntRange(1, 65535), default=8000, show_default=True, help="Port to listen on."),
        config_option(STAGE),
        version_option(),
    ]
    scale_out = click.Command(
        "scale-out", params=params, callback=_scale_out, help=_scale_out.__doc__, epilog=EPILOG,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    )  # fmt: skip
    name_variables(scale_out, "BELLE_SCALE_OUT")
    return scale_out


def _scale_out(
    engine: Path, serve: tuple[str, ...], address: str | None, name: str, host: str, port: int, **params: Any
) -> None:
    """Serve replicas of the engine in directory ENGINE by Ray Serve, by OpenAI's API.

    ENGINE must be at the same place on every node. The same command with another ENGINE replaces the replicas while they serve.
    """
    arguments = Arguments(str(engine.absolute()), serve, record_of(ScaleOutOptions, params))
    _check_extra()
    from belle_compile.runtime.scale_out.cluster import deploy

    deploy(arguments, name=name, address=address, host=host, port=port)


def _check_extra() -> None:
    """Raise `EngineError` where a package of the extra `ray` is missing."""
    for module in _EXTRA:
        try:
            importlib.import_module(module)
        except ImportError:
            what, remedy = "belle-run scale-out needs packages that are not installed", install("ray")
            raise EngineError(STAGE, what, found=f"no {module}", remedy=remedy) from None
