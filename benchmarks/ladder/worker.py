"""One step of the ladder in a process of its own, which answers samples asked for on the standard input.

    python -m benchmarks.ladder.worker SETTINGS      # started by benchmarks.ladder, and as each rank by the launcher

A line is a JSON object with `requests` (a file), `users` and `seconds`; the answer is a line that begins with RESULT.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from belle_compile.runtime.distributed import ranks
from belle_compile.runtime.distributed.launcher import Launcher
from belle_compile.runtime.errors import BelleError
from benchmarks.ladder.steps import read_requests
from benchmarks.ladder.ways import WAYS

_TIMEOUT_S = 120.0  # for a rank to start, and between two signs of life: ranks of a step that is not measured are stopped
RESULT = "RESULT "


def answer(settings: dict[str, Any]) -> None:
    """Make the way that a step says, and take samples until the input ends."""
    way = WAYS[settings["way"]](settings)
    print(f"{RESULT}{json.dumps('ready')}", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        found = way.sample(read_requests(Path(asked["requests"])), asked["users"], asked["seconds"])
        print(f"{RESULT}{json.dumps(found.to_plain())}", flush=True)


def main() -> int:
    """Run the step, as a launcher of ranks, or as one of them; returns the exit code."""
    settings = json.loads(sys.argv[1])
    here = ranks.place()
    if settings["ranks"] == 1:
        answer(settings)
        return 0
    if here is None or not ranks.supervised():
        launcher = Launcher(settings["ranks"], [sys.executable, *sys.orig_argv[1:]], _TIMEOUT_S)
        code = launcher.run()
        if launcher.error:
            print(launcher.error, file=sys.stderr)
        return code
    line, code = ranks.Line(here), 0
    try:
        answer(settings)
    except BelleError as error:
        line.say("error", error.parts())
        code = 1
    except SystemExit as ended:  # raised by a rank that has served the steps of rank 0
        code = int(ended.code or 0)
    line.say("exit", code)
    return code


if __name__ == "__main__":
    sys.exit(main())
