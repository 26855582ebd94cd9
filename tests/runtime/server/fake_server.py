"""A server of a fake engine in a process of its own, for tests with signals: python -m tests.runtime.server.fake_server.

The arguments are those of `belle-run serve` without the engine. The first line of output is the port.
"""

from __future__ import annotations

import sys

from belle_compile.runtime.server.cli import command, records
from belle_compile.runtime.server.logs import configure
from belle_compile.runtime.server.serve import bind, run
from belle_compile.runtime.server.service import Service
from tests.runtime.fakes import make_engine
from tests.runtime.server.live import make_app, passing


def main() -> int:
    options, _ = records(command().make_context("serve", ["engine", *sys.argv[1:]]).params)
    configure(options)
    engine = make_engine()
    engine.self_test = passing  # type: ignore[method-assign]
    service = Service(engine, options)
    sockets = bind(options)
    assert sockets
    print(sockets[0].getsockname()[1], flush=True)
    return run(make_app(service), service, sockets)


if __name__ == "__main__":
    sys.exit(main())
