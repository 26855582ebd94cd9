"""The server process of a replica, and requests that are passed on to it over its Unix socket."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from yarl import URL

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.scale_out.options import STAGE

_DIE_WITH_PARENT = Path(__file__).with_name("die_with_parent.py")
_POLL_S = 0.1
_PROBE_S = 5.0
_OF_A_CONNECTION = frozenset(
    {"connection", "expect", "host", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te",
     "trailer", "transfer-encoding", "upgrade"}
)  # fmt: skip


@dataclass(frozen=True)
class Forwarded:
    """A request of a client: method, path with the query, headers and body."""

    method: str
    path: str
    headers: tuple[tuple[str, str], ...]
    body: bytes


@dataclass(frozen=True)
class Head:
    """The status and the headers of a response."""

    status: int
    headers: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Lost:
    """No more of the response will come. Of a request that was not `sent`, the server has seen nothing."""

    reason: str
    sent: bool


class ServerProcess:
    """A process of `belle-run serve`, or the launcher of its ranks, that listens on a Unix socket of its own.

    It must be used on one event loop.
    """

    def __init__(self, command: Sequence[str]) -> None:
        """Start a command that serves on the socket behind its last argument, which is to be `--uds`."""
        self._folder = Path(tempfile.mkdtemp(prefix="belle-replica-"))
        uds = self._folder / "socket"
        guard = [sys.executable, "-I", "-S", str(_DIE_WITH_PARENT), str(os.getpid())]
        self._process = subprocess.Popen([*guard, *command, str(uds)], stdin=subprocess.DEVNULL)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(str(uds), limit=0), timeout=aiohttp.ClientTimeout(total=None),
            auto_decompress=False, skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
        )  # fmt: skip

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    async def wait_ready(self, timeout_s: float) -> None:
        """Wait until /ready is 200; raises `EngineError` when the process ends first, or does not get ready in time."""
        end = asyncio.get_running_loop().time() + timeout_s
        while not await self.ready():
            if not self.alive:
                found = f"exit code {self._process.returncode}"
                raise EngineError(STAGE, "the server of a replica has ended", found=found, remedy="its log says why")
            if asyncio.get_running_loop().time() > end:
                expected = f"/ready within {timeout_s:g} s"
                raise EngineError(STAGE, "the server of a replica does not get ready", expected=expected)
            await asyncio.sleep(_POLL_S)

    async def ready(self) -> bool:
        """Whether the process lives and is ready for requests."""
        if not self.alive:
            return False
        with contextlib.suppress(aiohttp.ClientError, TimeoutError, asyncio.TimeoutError):
            async with self._session.get(_url("/ready"), timeout=aiohttp.ClientTimeout(total=_PROBE_S)) as response:
                return bool(response.status == 200)
        return False

    async def text(self, path: str) -> str:
        """Return the text of a path; raises `aiohttp.ClientError` where there is none."""
        limit = aiohttp.ClientTimeout(total=_PROBE_S)
        async with self._session.get(_url(path), timeout=limit, raise_for_status=True) as response:
            return str(await response.text())

    async def forward(self, request: Forwarded) -> AsyncIterator[Head | bytes | Lost]:
        """Yield the head of the response, then its body in pieces, as they come. What is lost ends it with `Lost`.

        A caller that stops, or is cancelled, closes the connection, on which the server drops the request.
        """
        if not self.alive:
            yield Lost("The server of the replica has ended.", sent=False)
            return
        try:
            async with self._session.request(
                request.method, _url(request.path), data=request.body or None, headers=_end_to_end(request.headers),
                allow_redirects=False,
            ) as response:  # fmt: skip
                yield Head(response.status, _end_to_end(tuple(response.headers.items())))
                async for piece in response.content.iter_any():
                    yield piece
        except aiohttp.ClientConnectorError:
            yield Lost("The server of the replica does not take connections.", sent=False)
        except (aiohttp.ClientError, ConnectionError):
            yield Lost("The server of the replica was lost.", sent=True)

    async def stop(self, timeout_s: float) -> int:
        """Let the server drain, and kill it where it takes longer than `timeout_s`; returns its exit code."""
        if self.alive:
            self._process.send_signal(signal.SIGTERM)
        end = asyncio.get_running_loop().time() + timeout_s
        while self.alive and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(_POLL_S)
        if self.alive:
            self._process.kill()
        code = await asyncio.to_thread(self._process.wait)
        await self._session.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        return code


def serve_command(engine: str, serve: Sequence[str]) -> list[str]:
    """The command that serves an engine on the socket whose path is to be its next argument."""
    return [sys.executable, "-m", "belle_compile.runtime", "serve", engine, *serve, "--uds"]


def _url(path: str) -> URL:
    return URL(f"http://replica{path}", encoded=True)  # the host is that of the Unix socket, whatever its name


def _end_to_end(headers: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """The headers but for those that are about one connection."""
    return tuple((name, value) for name, value in headers if name.lower() not in _OF_A_CONNECTION)
