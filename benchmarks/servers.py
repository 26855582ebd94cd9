"""A `belle-run serve` process for measurements."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

READY_S = 120.0


class Server:
    """Serves an engine on a free port of the loopback interface while the `with` block runs."""

    def __init__(self, engine: Path, *arguments: str, program: str = "belle_compile.runtime", ready: str = "/ready") -> None:
        """Start the server with further `arguments` of `belle-run serve`. `program` is the module that is `belle-run`; it is
        ready when it answers `ready`."""
        self._ready = ready
        self.host, self.model = "127.0.0.1", engine.name
        with socket.socket() as probe:
            probe.bind((self.host, 0))
            self.port: int = probe.getsockname()[1]
        command = [sys.executable, "-m", program, "serve", str(engine), "--port", str(self.port)]
        self._process = subprocess.Popen([*command, "--served-model-name", self.model, "--log-level", "warning", *arguments])

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

    def __enter__(self) -> Server:
        end = time.monotonic() + READY_S
        while time.monotonic() < end and self._process.poll() is None:
            try:
                self.get(self._ready)
                return self
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.05)
        self._process.kill()
        raise SystemExit(f"the server did not become ready in {READY_S:.0f} s")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.terminate()
        self._process.wait(timeout=60)
