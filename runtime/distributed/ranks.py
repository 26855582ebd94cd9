"""A process as one of several ranks: which one it is, and its connection to the launcher that supervises them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass

from belle_compile.runtime.errors import EngineError

LAUNCHER = "BELLE_LAUNCHER"  # path of the launcher's socket
TIMEOUT = "BELLE_RANK_TIMEOUT"
TIMEOUT_S = 10.0

# Variables in which launchers give the processes that they start their rank and the number of ranks. Slurm sets the first one
# also for a process that it starts alone.
PLACES = (
    ("PMI_RANK", "PMI_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
)


@dataclass(frozen=True)
class Place:
    """This process is rank `rank` of `ranks`."""

    rank: int
    ranks: int


def place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """The place of a process with this environment among ranks that mpiexec or srun started; None where it is the only one."""
    for rank, ranks in PLACES:
        with contextlib.suppress(KeyError, ValueError):
            result = Place(int(environment[rank]), int(environment[ranks]))
            if result.ranks > 1:
                return result
    return None


def timeout_s() -> float:
    """Seconds that ranks wait for one that does not start (environment variable BELLE_RANK_TIMEOUT)."""
    try:
        return float(os.environ.get(TIMEOUT, TIMEOUT_S))
    except ValueError:
        raise EngineError("ranks", TIMEOUT, found=repr(os.environ[TIMEOUT]), expected="seconds") from None


def supervised() -> bool:
    """Whether a launcher of ours (`launcher.Launcher`) started this rank and supervises it."""
    return LAUNCHER in os.environ


class Line:
    """A rank's connection to its launcher.

    A thread answers the launcher's questions whether the rank is alive, and ends the rank when the launcher is gone.
    """

    def __init__(self, own_place: Place) -> None:
        """Report to the launcher, and wait until all ranks have done so. Rank 0 then takes over the standard files."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._lock = threading.Lock()
        try:
            self._socket.connect(os.environ[LAUNCHER])
        except OSError:
            sys.exit(1)  # the launcher has ended, so there is nothing to report to
        if own_place.rank:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 decides what an interrupt means
        self.say("hello", own_place.rank)
        started, handles, _, _ = socket.recv_fds(self._socket, 1, 3)
        if not started:
            os._exit(1)
        for number, handle in enumerate(handles):
            os.dup2(handle, number)
            os.close(handle)
        threading.Thread(target=self._answer, name="launcher", daemon=True).start()

    def say(self, what: str, value: object = None) -> None:
        """Send the launcher "hello" with the rank's number, "alive", "error" with its parts, or "exit" with a code."""
        with self._lock, contextlib.suppress(OSError):
            self._socket.sendall(json.dumps([what, value]).encode() + b"\n")

    def _answer(self) -> None:
        while True:
            try:
                question = self._socket.recv(1)
            except OSError:
                question = b""
            if not question:
                os._exit(1)  # the launcher is gone
            self.say("alive")
