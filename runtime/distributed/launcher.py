"""belle-run of several ranks: starts them with mpiexec, supervises them, and ends all of them when one ends.

Each rank is connected to this process (runtime/distributed/ranks.py), and so is its parent, which reports how the rank ended
(runtime/distributed/rank_parent.py). What goes wrong is reported once, here, in one sentence: what MPI prints about ranks that
ended is filtered out.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from belle_compile.runtime.distributed.ranks import LAUNCHER, TIMEOUT, place
from belle_compile.runtime.errors import BelleError, EngineError, install

INTERRUPT = frozenset({signal.SIGINT})
_TICK_S = 0.1
_LAST_OUTPUT_S = 4.0  # for a rank's last output, such as a traceback, and for the report of how it ended
_END_S = 5.0  # for ranks to end after rank 0 has ended
_TWICE_S = 1.0  # a second signal within this time ends all ranks at once
_LONGEST_FOLDER = 72  # bytes of a path to which a folder and the name of a socket are added
_PARENT = (sys.executable, "-I", "-S", str(Path(__file__).with_name("rank_parent.py")))
# Lines of Hydra (mpiexec) about processes that ended, and of MPICH about a rank that aborts all.
_NOISE = re.compile(
    r"=|YOUR APPLICATION TERMINATED|This typically refers to|Please see the FAQ|\[proxy:|\[mpiexec@|Abort\(|internal ABORT|\s*$"
)


class _Rank:
    """The state of a rank that has been started or has reported."""

    def __init__(self, number: int) -> None:
        self.number, self.process = number, 0
        self.parent: socket.socket | None = None  # the connection of its parent, once the rank was started
        self.line: socket.socket | None = None  # the connection of the rank itself, once it has reported
        self.silent_s = 0.0  # seconds since its last message
        self.exit: int | None = None  # the exit code that the rank announced
        self.ended: int | None = None  # its exit code, or minus the signal that killed it, as its parent reported
        self.ended_s = float("inf")  # when it ended
        self.gone = False  # whether one of the two connections was closed

    @property
    def name(self) -> str:
        return f"rank {self.number} (process {self.process})"

    @property
    def lost(self) -> bool:
        """Whether it ended without announcing an exit code."""
        return self.exit is None and (self.gone or self.ended is not None)

    @property
    def how_it_ended(self) -> str:
        """How the rank ended, as the second half of a sentence."""
        if self.ended is None:
            return "ended unexpectedly"
        if self.ended < 0:
            names = {entry.value: f" ({entry.name})" for entry in signal.Signals}  # without some real-time signals
            return f"was killed by signal {-self.ended}{names.get(-self.ended, '')}"
        return f"ended with exit code {self.ended}"


def _folder_of_sockets() -> str:
    """The folder of temporary files, or /tmp where its path leaves too little of the 107 bytes of a socket's address."""
    folder = tempfile.gettempdir()
    return folder if len(os.fsencode(folder)) <= _LONGEST_FOLDER else "/tmp"


class Launcher:
    """One run of an engine of several ranks."""

    def __init__(
        self, ranks: int, command: Sequence[str], timeout_s: float, handled_signals: frozenset[signal.Signals] = INTERRUPT
    ) -> None:
        """Each of `ranks` ranks runs `command`. A rank that does not answer for `timeout_s` seconds ends the run. Rank 0
        handles the signals in `handled_signals`; other signals end all ranks."""
        self._count, self._command, self._timeout_s = ranks, list(command), timeout_s
        self._handled = handled_signals
        self._ranks: dict[int, _Rank] = {}
        self.error: BelleError | None = None
        self._output: list[str] = []  # the last lines of mpiexec and of ranks other than 0
        self._partial_line = b""
        self._signals: list[int] = []  # received and not yet handled
        self._interrupted_s = float("-inf")  # when the last interrupt went to rank 0
        self._asked_s = 0.0  # seconds since ranks were last asked whether they are alive
        self._select = selectors.DefaultSelector()

    def run(self) -> int:
        """Run to the end; returns the exit code. What went wrong is `error` then."""
        with tempfile.TemporaryDirectory(prefix="belle-ranks-", dir=_folder_of_sockets()) as directory, self._handled_signals():
            self._address = str(Path(directory) / "line")
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
                listener.bind(self._address)
                listener.listen(2 * self._count)
                self._select.register(listener, selectors.EVENT_READ, self._accept)
                self._start()
                try:
                    code = self._watch()
                finally:
                    self._end_all()
                    self._select.close()
        return code or int(self.error is not None)

    def _start(self) -> None:
        # MPI must yield the core while it polls, or ranks that outnumber the cores keep each other from running. Within a job
        # of Slurm or the like Hydra would start ranks on the hosts of the job. The session of its own keeps the terminal's
        # signals from the ranks: they are for this process alone.
        environment = {"MPIR_CVAR_POLLS_BEFORE_YIELD": "100", "HYDRA_LAUNCHER": "fork", "HYDRA_RMK": "user", **os.environ}
        environment |= {LAUNCHER: self._address, TIMEOUT: str(self._timeout_s)}
        self._mpiexec = subprocess.Popen(
            [mpiexec(), "-n", str(self._count), *_PARENT, self._address, *self._command], env=environment,
            start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert self._mpiexec.stdout is not None, "a pipe"
        os.set_blocking(self._mpiexec.stdout.fileno(), False)
        self._select.register(self._mpiexec.stdout, selectors.EVENT_READ, self._read_output)

    def _watch(self) -> int:
        """Supervise the ranks until all have ended or something went wrong; returns the exit code."""
        last, waited = time.monotonic(), 0.0
        while not self.error:
            ended = self._mpiexec.poll() is not None  # asked first: all messages sent before that are read below
            self._read_messages(0 if ended else _TICK_S)
            # Time counts by at most a second, since this process may have been stopped itself.
            now = time.monotonic()
            passed, last = min(now - last, 1.0), now
            code = self._handle_signals()
            if code is not None:
                return code
            first = self._ranks.get(0)
            if first and first.exit is not None:
                self._wait(_END_S, self._ranks_have_ended)
                self._release_parents()
                return first.exit
            if ended or any(rank.lost for rank in self._ranks.values()):
                self.error = self.error or self._end_error()
            elif self._absent():
                waited += passed
                if waited > self._timeout_s:
                    self.error = self._late_error()
            else:
                self._check_alive(passed)
        return 1

    def _read_messages(self, timeout: float) -> None:
        """Handle the messages and the output that have arrived; waits up to `timeout` seconds for the first."""
        for key, _ in self._select.select(timeout):
            key.data(key.fileobj)

    def _wait(self, seconds: float, until: Callable[[], bool]) -> None:
        """Read messages until a condition holds, for at most `seconds` seconds."""
        end = time.monotonic() + seconds
        while not until() and time.monotonic() < end:
            self._read_messages(_TICK_S)

    def _accept(self, listener: socket.socket) -> None:
        line, _ = listener.accept()
        pending = [b""]  # an incomplete message
        self._select.register(line, selectors.EVENT_READ, lambda _: self._receive(line, pending))

    def _receive(self, line: socket.socket, pending: list[bytes]) -> None:
        """Read messages, a line of JSON each, of a rank or its parent; `pending` has the beginning of an incomplete one."""
        try:
            data = line.recv(65536)
        except OSError:
            data = b""
        if not data:
            rank = self._rank_of(line)
            self._select.unregister(line)
            line.close()
            if rank:
                rank.gone = True
            return
        *lines, pending[0] = (pending[0] + data).split(b"\n")
        for text in lines:
            kind, value = json.loads(text)
            if kind == "started":
                self._started(value[0], value[1], line)
            elif kind == "hello":
                self._greet(value, line)
            elif rank := self._rank_of(line):  # which a message before this one may have introduced
                rank.silent_s = 0.0
                if kind == "error":
                    self.error = self.error or BelleError(**value)
                elif kind == "exit":
                    rank.exit = int(value)
                elif kind == "ended":
                    rank.ended, rank.ended_s = value

    def _rank_of(self, line: socket.socket) -> _Rank | None:
        return next((rank for rank in self._ranks.values() if line in (rank.line, rank.parent)), None)

    def _started(self, parent: int, process: int, line: socket.socket) -> None:
        """Handle the message of a rank's parent that has started it."""
        with contextlib.suppress(OSError):  # the parent is gone; its closed connection shows that
            parent_place = place(_environment(parent))
            if parent_place:
                rank = self._ranks.setdefault(parent_place.rank, _Rank(parent_place.rank))
                rank.process, rank.parent = process, line

    def _greet(self, number: int, line: socket.socket) -> None:
        """Handle the first message of a rank. Once all have sent one, let them continue, rank 0 with our input and outputs."""
        self._ranks.setdefault(number, _Rank(number)).line = line
        if self._absent():
            return
        for rank in self._ranks.values():
            assert rank.line, "no rank is absent"
            rank.silent_s = 0.0
            with contextlib.suppress(OSError):  # the rank is gone; its closed connection shows that
                socket.send_fds(rank.line, [b"!"], [] if rank.number else _standard_files())

    def _handle_signals(self) -> int | None:
        """Pass signals on to rank 0, which decides what they mean; for those that it does not handle, and for a second one
        within a moment, return the exit code of the run."""
        while self._signals:
            number = self._signals.pop(0)
            first = self._ranks.get(0)
            now = time.monotonic()
            if number not in self._handled or self._absent() or first is None:
                return 128 + number
            if number != signal.SIGHUP:  # which asks for nothing to end
                if now - self._interrupted_s < _TWICE_S:
                    return 128 + number
                self._interrupted_s = now
            if first.ended is None and not first.gone:
                os.kill(first.process, number)
        return None

    def _check_alive(self, passed: float) -> None:
        """Ask ranks every second whether they are alive; a rank that has not answered for too long ends the run."""
        running = [rank for rank in self._ranks.values() if rank.exit is None]
        self._asked_s += passed
        for rank in running:
            rank.silent_s += passed
            if self._asked_s > 1 and rank.line:
                with contextlib.suppress(OSError):
                    rank.line.send(b"?", socket.MSG_DONTWAIT)
        self._asked_s = 0.0 if self._asked_s > 1 else self._asked_s
        silent = [rank for rank in running if rank.silent_s > self._timeout_s]
        if silent:
            # The others may be silent because they wait for one that was stopped.
            rank = next((rank for rank in silent if _is_stopped(rank.process)), silent[0])
            state = "it is stopped" if _is_stopped(rank.process) else f"nothing for {self._timeout_s:g} s"
            self.error = EngineError("ranks", f"{rank.name} does not answer", found=state)

    def _late_error(self) -> BelleError:
        what = f"{_names(self._absent())} did not start"
        remedy = "look at what holds it up, or give it more time with --rank-timeout"
        # The last output is all that there is to show of a rank that failed early: mpiexec reports nothing about it.
        found = self._last_output() or f"nothing within {self._timeout_s:g} s"
        return EngineError("ranks", what, found=found, remedy=remedy)

    def _ranks_have_ended(self) -> bool:
        """Whether rank 0 has ended and, if it succeeded, the others too; if it failed, they may be waiting for it."""
        return all(rank.ended is not None for number, rank in self._ranks.items() if number == 0 or not self._ranks[0].exit)

    def _end_error(self) -> BelleError:
        """The error for the rank that ended first, which is known, since its parent keeps MPI from ending the others."""
        self._wait(_LAST_OUTPUT_S, lambda: any(rank.lost and rank.ended is not None for rank in self._ranks.values()))
        first = min((rank for rank in self._ranks.values() if rank.lost), key=lambda rank: rank.ended_s, default=None)
        absent = self._absent()
        self._release_parents()
        if self.error:
            return self.error  # a rank has sent one in the meantime
        if not self._ranks:
            found = self._last_output() or f"exit code {self._mpiexec.returncode}"
            return EngineError("ranks", "mpiexec could not start them", found=found)
        name, how = (first.name, first.how_it_ended) if first else ("one of them", "ended unexpectedly")
        early, found = (" before all had started", self._last_output()) if absent else ("", "")
        return EngineError("ranks", f"{name} {how}{early}", found=found, remedy="the other ranks were ended with it")

    def _release_parents(self) -> None:
        """Let the parents of ranks end, which kill the ranks that still run. Then mpiexec ends, and its last output is read."""
        for rank in self._ranks.values():
            if rank.parent:
                with contextlib.suppress(OSError):
                    rank.parent.shutdown(socket.SHUT_RDWR)
        self._wait(_LAST_OUTPUT_S, lambda: self._mpiexec.poll() is not None)
        self._read_messages(0)

    def _last_output(self) -> str:
        """The last line that mpiexec or a rank printed, apart from MPI's lines about ranks that ended."""
        return next((line for line in reversed(self._output) if not _NOISE.match(line)), "")

    def _absent(self) -> list[int]:
        """The numbers of ranks that have not reported."""
        return [number for number in range(self._count) if not (rank := self._ranks.get(number)) or not rank.line]

    def _read_output(self, pipe: Any) -> None:
        data = os.read(pipe.fileno(), 65536)
        if not data:
            self._select.unregister(pipe)
        *lines, self._partial_line = (self._partial_line + data).split(b"\n")
        for line in lines:
            text = line.decode(errors="replace")
            self._output.append(text)
            del self._output[:-200]
            if not self._absent() and not _NOISE.match(text):
                print(text, file=sys.stderr, flush=True)  # such as a traceback

    def _end_all(self) -> None:
        """Kill the remaining processes of the run: all that have its address in their environment."""
        end = time.monotonic() + _END_S
        while _kill_all(self._address) and time.monotonic() < end:
            time.sleep(0.02)
        self._mpiexec.wait()
        for rank in self._ranks.values():
            for line in (rank.parent, rank.line):
                if line:
                    line.close()

    @contextlib.contextmanager
    def _handled_signals(self) -> Iterator[None]:
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, lambda number, _: self._signals.append(number)) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def mpiexec() -> str:
    """The path of mpiexec: that of this interpreter's environment, else the first on the PATH. Raises `EngineError`."""
    path = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")
    if path is None:
        remedy = f"{install('ranks')}, or put that of an MPI installation on the PATH"
        raise EngineError("ranks", "mpiexec is missing", remedy=remedy)
    return path


def _names(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _standard_files() -> list[int]:
    """This process' input and outputs, with /dev/null in place of those that are closed."""
    files = []
    for number in range(3):
        try:
            os.fstat(number)
            files.append(number)
        except OSError:
            files.append(os.open(os.devnull, os.O_RDWR))
    return files


def _environment(process: int) -> dict[str, str]:
    """The environment that a process was started with."""
    pairs = Path(f"/proc/{process}/environ").read_bytes().decode(errors="surrogateescape").split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def _is_stopped(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state in "Tt"


def _kill_all(address: str) -> int:
    """Kill all processes that were started with this launcher's address; returns how many there were.

    Ranks and their parents come first, each rank before its parent, and MPI's launcher last: a rank that finds it gone may
    still print so.
    """
    targets = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        process, environment = int(entry.name), {}
        with contextlib.suppress(OSError):
            handle = os.pidfd_open(process)  # opened first: from here on the number cannot become another process's
            with contextlib.suppress(OSError):
                environment = _environment(process)
            if environment.get(LAUNCHER) == address:
                targets.append((place(environment) is None, -process, handle))
            else:
                os.close(handle)
    for _, _, handle in sorted(targets):
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        os.close(handle)
    return len(targets)
