"""Many connections at once: 10,000 idle ones are held, and 1,000 slow readers get their answers.

    python -m benchmarks.server_crowd ENGINE [--out benchmarks/results/server-crowd.json]

A request is answered beside either crowd. The slow readers have a receive buffer of 1 KiB and read half of that at a time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import socket
import time
from pathlib import Path
from typing import Any

from belle_compile.runtime.server.serve import allow_connections
from benchmarks import machine
from benchmarks.servers import Server

IDLE, READERS = 10_000, 1000
ANSWER = 40  # tokens of each slow reader
_PROMPTS = 10  # different ones of the readers: the others share their answers
_BUFFER, _READ, _PAUSE_S, _LONGEST_S = 1024, 512, 0.02, 300.0


def _memory_mib(process: int) -> float:
    (kib,) = re.findall(r"RssAnon:\s*(\d+) kB", Path(f"/proc/{process}/status").read_text(encoding="utf-8"))
    return round(int(kib) / 1024, 1)


def _request_s(server: Server) -> float:
    """Seconds of a request beside the others."""
    started = time.monotonic()
    server.post("/v1/completions", {"prompt": "hi", "max_tokens": 8, "seed": 1})
    return round(time.monotonic() - started, 2)


def hold_idle(server: Server, count: int) -> dict[str, Any]:
    """Open connections that send nothing, and count those that the server has not closed after another request."""
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(socket.create_connection((server.host, server.port), 60)) for _ in range(count)]
        request_s, held = _request_s(server), 0
        for connection in connections:
            connection.setblocking(False)
            try:
                connection.recv(1)
            except BlockingIOError:
                held += 1
        return {"idle": count, "held": held, "request_s": request_s, "server_memory_mib": _memory_mib(server.process)}


def read_slowly(server: Server, count: int) -> dict[str, Any]:
    """Read a stream over each of `count` connections at a few bytes a time, and count those that come to their end."""
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        ends: dict[socket.socket, bytes] = {}
        for number in range(count):
            connection = stack.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
            connection.connect((server.host, server.port))
            body = {"prompt": "a b c", "max_tokens": ANSWER, "ignore_eos": True, "stream": True, "seed": number % _PROMPTS}
            content = json.dumps(body).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {server.host}\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode() + content)
            connection.setblocking(False)
            ends[connection] = b""
        request_s, whole = _request_s(server), 0
        while ends and time.monotonic() < started + _LONGEST_S:
            for connection, end in list(ends.items()):
                with contextlib.suppress(BlockingIOError):
                    data = connection.recv(_READ)
                    ends[connection] = (end + data)[-64:]
                    if not data:
                        whole += b"data: [DONE]" in ends.pop(connection)
            time.sleep(_PAUSE_S)
        facts = {"slow_readers": count, "whole": whole, "unfinished": len(ends), "request_s": request_s}
        return facts | {"seconds": round(time.monotonic() - started, 1), "server_memory_mib": _memory_mib(server.process)}


def main() -> None:
    """Measure, print and write the rows; the exit status is 1 where a connection was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if allow_connections(IDLE) < IDLE:
        raise SystemExit(f"the limit of open files (ulimit -Hn) allows fewer than {IDLE} connections")
    with Server(options.engine, "--max-connections", str(IDLE + READERS), "--keep-alive-timeout", "600") as server:
        before = _memory_mib(server.process)
        rows = [hold_idle(server, IDLE), read_slowly(server, READERS)]
    result = {"machine": machine.describe(), "engine": options.engine.name, "memory_before_mib": before, "rows": rows}
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    raise SystemExit(rows[0]["held"] < IDLE or rows[1]["whole"] < READERS)


if __name__ == "__main__":
    main()
