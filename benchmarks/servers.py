"""Servers for measurements, each a process on the loopback interface: `belle-run serve`, and any other with a ready check."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.processes import signal_tree

READY_S = 120.0
_STOP_S = 60.0


class NotReadyError(SystemExit):
    """A server that ended, or did not become ready in its time."""


class ServerProcess:
    """A server on a free port of the loopback interface while the `with` block runs.

    It runs in a session of its own, and whatever it has started ends with it: some servers leave workers behind.
    """

    def __init__(
        self,
        command: Callable[[int], Sequence[str]],
        model: str,
        *,
        ready: str = "/ready",
        ready_s: float = READY_S,
        environment: Mapping[str, str] | None = None,
        log: Path | None = None,
    ) -> None:
        """Start `command(port)`, which serves `model`. The server is ready when it answers `ready` with 200, for which it has
        `ready_s` seconds. What it prints goes to the file `log`, or to where this process prints."""
        self._ready, self._ready_s, self._log = ready, ready_s, log
        self.host, self.model = "127.0.0.1", model
        with socket.socket() as probe:
            probe.bind((self.host, 0))
            self.port: int = probe.getsockname()[1]
        with log.open("wb") if log else contextlib.nullcontext() as output:
            self._process = subprocess.Popen(
                [*command(self.port)], stdout=output, stderr=output, env={**os.environ, **(environment or {})},
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    @property
    def process(self) -> int:
        """The id of the server's process."""
        return self._process.pid

    @property
    def url(self) -> str:
        """The address of the API, without /v1."""
        return f"http://{self.host}:{self.port}"

    def get(self, path: str) -> Any:
        """Return the JSON of a path."""
        with urllib.request.urlopen(f"{self.url}{path}", timeout=30) as response:
            return json.load(response)

    def post(self, path: str, body: dict[str, Any]) -> tuple[Any, dict[str, str]]:
        """Send JSON; returns the JSON and the headers of the answer, names in lower case."""
        data = json.dumps({"model": self.model} | body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=300) as response:
            return json.load(response), {name.lower(): value for name, value in response.headers.items()}

    def pause(self) -> None:
        """Stop the server's processes, so that they take nothing from what is measured beside them."""
        signal_tree(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let the server's processes go on."""
        signal_tree(self._process.pid, signal.SIGCONT)

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}{self._ready}", timeout=30) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def wait(self) -> None:
        """Wait until the server is ready; raises NotReadyError where it ends or takes too long."""
        end = time.monotonic() + self._ready_s
        while time.monotonic() < end and self._process.poll() is None:
            if self._is_ready():
                return
            time.sleep(0.05)
        ended = self._process.poll()
        self.stop()
        where = f", see {self._log}" if self._log else ""
        why = f"did not become ready in {self._ready_s:.0f} s" if ended is None else f"ended with status {ended}"
        raise NotReadyError(f"the server of {self.model} {why}{where}")

    def stop(self) -> None:
        """End the server and all that it has started, by force where it does not end in a minute."""
        if self._process.poll() is None:
            self.resume()
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # the server leads its session's group, workers included
        self._process.wait(_STOP_S)

    def __enter__(self) -> ServerProcess:
        try:
            self.wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()


class Server(ServerProcess):
    """Serves an engine with `belle-run serve`."""

    def __init__(self, engine: Path, *arguments: str, program: str = "belle_compile.runtime", ready: str = "/ready") -> None:
        """Start the server with further `arguments` of `belle-run serve`. `program` is the module that is `belle-run`; it is
        ready when it answers `ready`."""
        name = ["--served-model-name", engine.name, "--log-level", "warning"]
        super().__init__(
            lambda port: [sys.executable, "-m", program, "serve", str(engine), "--port", str(port), *name, *arguments],
            engine.name,
            ready=ready,
        )

    def __enter__(self) -> Server:
        super().__enter__()
        return self
