"""A command that works with an engine: in this process, or as one of the ranks that its launcher starts."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from belle_compile.runtime.artifact import read_manifest
from belle_compile.runtime.distributed import ranks
from belle_compile.runtime.distributed.launcher import INTERRUPT, Launcher
from belle_compile.runtime.errors import BelleError, EngineError
from belle_compile.runtime.loading import check_ranks
from belle_compile.runtime.usage import show_error, show_json


def run_command(
    engine: Path,
    work: Callable[[], int],
    *,
    ranks_requested: int | None,
    rank_timeout_s: float,
    handled_signals: frozenset[signal.Signals] = INTERRUPT,
    as_json: bool = False,
) -> int:
    """Run `work` once for an engine of one rank, else in as many processes as it has ranks; returns the exit code.

    Each process runs the command line of this one again. `work` returns the exit code of rank 0. Of several ranks, the others
    end within it. Signals in `handled_signals` are passed on to rank 0, where `work` handles them; others end all ranks. What
    goes wrong is printed on stderr, in one sentence, and with `as_json` as an object on stdout too.
    """
    os.environ[ranks.TIMEOUT] = str(rank_timeout_s)  # read by `Engine.load`
    place = ranks.place()
    line = ranks.Line(place) if place and ranks.supervised() else None
    try:
        count = _count(engine, ranks_requested)
        if count > 1 and place is None:
            launcher = Launcher(count, [sys.executable, *sys.orig_argv[1:]], rank_timeout_s, handled_signals)
            code = launcher.run()
            if launcher.error:
                show_error(launcher.error, as_json)
        else:
            code = work()
    except BelleError as error:
        if os.environ.get("BELLE_TRACEBACK"):
            raise
        code = 1
        if line:
            line.say("error", error.parts())
        else:
            show_error(error, as_json)
    except KeyboardInterrupt:
        code = 130
        print(file=sys.stderr)
        if as_json:
            show_json(EngineError("interrupted", "stopped by Ctrl-C").to_plain())
    except SystemExit as ended:  # how a rank other than 0 ends
        code = int(ended.code or 0)
    if line:
        sys.stdout.flush()
        line.say("exit", code)
    return code


def _count(engine: Path, requested: int | None) -> int:
    """Return the number of processes that run the engine; raises `EngineError` when another number is requested."""
    try:
        manifest = read_manifest(engine)
    except BelleError:
        return 1  # `Engine.load` reports what is wrong with the manifest
    check_ranks(manifest, manifest.target.ranks if requested is None else requested)
    return manifest.target.ranks
