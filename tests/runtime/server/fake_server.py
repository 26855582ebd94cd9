"""A server of a fake engine in a process of its own, for tests with signals: python -m tests.runtime.server.fake_server.

The arguments are those of `belle-run serve` without the engine. The first line of output is the port.
"""

from __future__ import annotations

import sys
import time

from belle_compile.runtime.server.cli import parse
from belle_compile.runtime.server.logs import configure
from belle_compile.runtime.server.serve import bind, run
from tests.runtime.fakes import FakeExecutor
from tests.runtime.server.live import make_app, make_service

STEP_S = 0.02


class SlowExecutor(FakeExecutor):
    def step(self, batch):  # type: ignore[no-untyped-def]
        time.sleep(STEP_S)
        return super().step(batch)


def main() -> int:
    options, _ = parse(sys.argv[1:])
    configure(options)
    service = make_service(SlowExecutor(), options=options)
    sockets = bind(options)
    assert sockets
    print(sockets[0].getsockname()[1], flush=True)
    return run(make_app(service), service, sockets)


if __name__ == "__main__":
    sys.exit(main())
