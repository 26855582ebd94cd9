"""Deploys an application to a Ray cluster, or to one that is started for it."""

from __future__ import annotations

import logging
import signal
import threading

import ray
from ray import serve
from ray.serve.schema import ApplicationStatus

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.scale_out.application import build
from belle_compile.runtime.scale_out.options import STAGE, Arguments

_WAIT_S = 1.0


def deploy(arguments: Arguments, *, name: str, address: str | None, host: str, port: int) -> None:
    """Run an application; one of that name is replaced, replica by replica, while it serves.

    At the address of a cluster it stays when this returns, which is once it runs. Without one, a cluster is started on this
    host and ends with SIGTERM or SIGINT. Raises `EngineError` where replicas cannot be started.
    """
    try:
        ray.init(address=address or "local", logging_level=logging.WARNING, log_to_driver=address is None)
    except ConnectionError as error:
        raise EngineError(STAGE, "no Ray cluster", found=str(error).splitlines()[0], expected="one at --address") from None
    try:
        serve.start(http_options={"host": host, "port": port}, proxy_location="EveryNode")
        _run(arguments, name)
        if address is None:
            _wait_for_signal()
            serve.shutdown()
    finally:
        ray.shutdown()


def _run(arguments: Arguments, name: str) -> None:
    try:
        serve.run(build(arguments), name=name)
    except RuntimeError:  # "Deploying application … failed"
        application = serve.status().applications.get(name)
        if application is None or application.status == ApplicationStatus.RUNNING:
            raise
        raise EngineError(
            STAGE, "the replicas cannot be started", found=application.message.strip().splitlines()[-1][:500],
            remedy="the logs of the replicas say why",
        ) from None  # fmt: skip


def _wait_for_signal() -> None:
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    while not ended.wait(_WAIT_S):
        pass
