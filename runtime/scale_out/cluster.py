"""Deploys an application to a Ray cluster, or to one that is started for it."""

from __future__ import annotations

import logging
import os
import signal
from typing import NoReturn

import ray
from ray import serve
from ray.serve.schema import ApplicationStatus

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.scale_out.application import build
from belle_compile.runtime.scale_out.options import STAGE, Arguments


class _Ended(BaseException):
    """A signal ends the cluster of this process."""


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
        if address is None:
            _end_by_signal()
        serve.start(http_options={"host": host, "port": port}, proxy_location="EveryNode")
        _run(arguments, name)
        while address is None:
            signal.pause()
    except _Ended:
        serve.shutdown()  # once the requests under way have ended
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


def _end_by_signal() -> None:
    """Let SIGTERM and SIGINT raise `_Ended` in the main thread, and a second one end the process at once."""
    numbers = (signal.SIGTERM, signal.SIGINT)

    def end(*_: object) -> NoReturn:
        for number in numbers:
            signal.signal(number, lambda number, _: os._exit(128 + number))
        raise _Ended

    for number in numbers:
        signal.signal(number, end)
