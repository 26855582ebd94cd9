"""What other connections cost: four streams alone, beside 64 quick and 64 slow readers, and beside 2,000 idle connections.

    python -m benchmarks.server_connections ENGINE [--out benchmarks/results/server-connections.json]

The four streams are measured while the others are there, in turns. Slow readers are to be compared with quick ones, which have
as many answers computed: with either, measuring begins once each of them has `FILL` tokens, more than the system's buffers of
a slow reader hold. It has a receive buffer of 1 KiB and small packets, and reads a byte ten times a second; both kinds of
readers call the model by a long name, which makes events large. Engines compute at most 64 answers at a time: those of four
readers end before the measurement, read or not. Every prompt is new, so that no cache helps.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import select
import socket
import statistics
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from belle_compile.runtime import Engine
from belle_compile.runtime.server.serve import allow_connections
from benchmarks import machine
from benchmarks.server_overhead import ANSWER, PROMPT, Round, new_prompts, request_of, stream
from benchmarks.servers import Server

FOREGROUND, READERS, IDLE = 4, 64, 2000
RUNNING = READERS - FOREGROUND  # readers whose answers are computed during the measurement
FILL = 256  # tokens of each reader before the measurement
READERS_ANSWER = 768  # more than there is time for
KV_TOKENS = FOREGROUND * 2 * (PROMPT + ANSWER) + READERS * (PROMPT + READERS_ANSWER + 64)  # nothing is preempted
BATCHES, ROUNDS = 2, 5  # of the four streams in each turn; of turns
_SLOW_BUFFER, _SLOW_PACKET, _SLOW_PAUSE_S = 1024, 536, 0.1
_LONG_NAME = 800 * "m"
Prompts = Callable[[int], list[list[int]]]  # returns so many new prompts


class Turn(NamedTuple):
    """What was measured beside one kind of connections.

    The bytes are those of the readers together: sent to them or waiting in buffers of the system. The server's memory is that
    of its process.
    """

    rounds: list[Round]
    readers_tokens: int = 0
    readers_bytes: int = 0
    server_bytes: int = 0


class Readers:
    """Streams of the background, all read in the same way by a thread while the `with` block runs."""

    def __init__(self, server: Server, prompts: list[list[int]], slow: bool) -> None:
        self._server, self._prompts, self._slow = server, prompts, slow
        self._sockets: dict[int, socket.socket] = {}
        self._read_bytes = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._read_slowly if slow else self._read_quickly)

    def __enter__(self) -> Readers:
        """Begin the streams, and wait until each has `FILL` tokens."""
        before = self._server.get("/stats")["generated_tokens"]
        for number, prompt in enumerate(self._prompts):
            connection = socket.socket()
            self._sockets[connection.fileno()] = connection
            if self._slow:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SLOW_BUFFER)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, _SLOW_PACKET)
            connection.connect((self._server.host, self._server.port))
            answer = READERS_ANSWER if number < RUNNING else FILL
            connection.sendall(request_of(self._server, prompt, answer, _LONG_NAME))
            connection.setblocking(False)
        self._thread.start()
        while True:
            stats = self._server.get("/stats")
            if stats["generated_tokens"] - before >= FILL * len(self._prompts) and stats["running"] == RUNNING:
                return self
            time.sleep(0.2)

    def __exit__(self, *_: object) -> None:
        """Close the connections, and wait until the server has given up the answers."""
        self._end.set()
        self._thread.join()
        for connection in self._sockets.values():
            connection.close()
        while self._server.get("/stats")["running"]:
            time.sleep(0.05)

    def _read_quickly(self) -> None:
        with select.epoll() as poll:
            for number in self._sockets:
                poll.register(number, select.EPOLLIN)
            while not self._end.is_set():
                for number, _ in poll.poll(_SLOW_PAUSE_S):
                    data = self._sockets[number].recv(1 << 16)
                    self._read_bytes += len(data)
                    if not data:
                        poll.unregister(number)

    def _read_slowly(self) -> None:
        while not self._end.wait(_SLOW_PAUSE_S):
            for connection in self._sockets.values():
                with contextlib.suppress(BlockingIOError):
                    self._read_bytes += len(connection.recv(1))

    def check(self) -> None:
        """Fail where the measurement took longer than the answers of the readers."""
        if self._server.get("/stats")["running"] != RUNNING:
            raise SystemExit("an answer of a reader ended before the measurement did: READERS_ANSWER is too small")

    def taken_bytes(self) -> int:
        """Bytes that the clients have read, or that the system holds for them: what the server is rid of."""
        return self._read_bytes + _queued_bytes(self._server.port)


def _queued_bytes(port: int) -> int:
    """Bytes in the system's buffers of all connections of a port, in either direction."""
    queued = 0
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, remote, _, queues, *_ = line.split()
        if port in (int(local.split(":")[1], 16), int(remote.split(":")[1], 16)):
            queued += sum(int(number, 16) for number in queues.split(":"))
    return queued


def _memory_bytes(process: int) -> int:
    """Bytes of memory that a process has to itself."""
    (kib,) = re.findall(r"RssAnon:\s*(\d+) kB", Path(f"/proc/{process}/status").read_text())
    return int(kib) << 10


def _foreground(server: Server, prompts: Prompts) -> list[Round]:
    return [stream(server, prompts(FOREGROUND)) for _ in range(BATCHES)]


def _beside_nothing(server: Server, prompts: Prompts) -> Turn:
    return Turn(_foreground(server, prompts))


def _beside_readers(server: Server, prompts: Prompts, *, slow: bool) -> Turn:
    before = server.get("/stats")["generated_tokens"]
    with Readers(server, prompts(READERS), slow) as readers:
        rounds = _foreground(server, prompts)
        readers.check()
        taken, memory = readers.taken_bytes(), _memory_bytes(server.process)
        tokens = server.get("/stats")["generated_tokens"] - before - BATCHES * FOREGROUND * ANSWER
    return Turn(rounds, tokens, taken, memory)


def _beside_idle(server: Server, prompts: Prompts) -> Turn:
    with contextlib.ExitStack() as stack:
        for _ in range(IDLE):
            stack.enter_context(socket.create_connection((server.host, server.port)))
        server.get("/stats")  # over one more connection, which is accepted after the others
        return Turn(_foreground(server, prompts))


def measure(server: Server, prompts: Prompts) -> list[dict[str, Any]]:
    """Return one row for each kind of other connections."""
    kinds: dict[str, Callable[[Server, Prompts], Turn]] = {
        "none": _beside_nothing,
        f"{READERS} quick readers": partial(_beside_readers, slow=False),
        f"{READERS} slow readers": partial(_beside_readers, slow=True),
        f"{IDLE} idle": _beside_idle,
    }
    turns: dict[str, list[Turn]] = {kind: [] for kind in kinds}
    for number in range(ROUNDS + 1):  # the first one warms up
        order = list(kinds) if number % 2 else list(reversed(kinds))
        for kind in order:
            turn = kinds[kind](server, prompts)
            if number:
                turns[kind].append(turn)
            print(kind, [round(each.rate, 1) for each in turn.rounds], flush=True)
    return [_row(kind, taken) for kind, taken in turns.items()]


def _row(kind: str, turns: list[Turn]) -> dict[str, Any]:
    rounds = [each for turn in turns for each in turn.rounds]
    row: dict[str, Any] = {
        "others": kind,
        "tokens_per_second": round(statistics.median(each.rate for each in rounds), 1),
        "first_token_ms": round(1000 * statistics.median(each.first_token_s for each in rounds), 1),
    }
    if turns[0].readers_tokens:
        row |= {
            "tokens_of_a_reader": round(statistics.median(turn.readers_tokens for turn in turns) / READERS),
            "taken_bytes_a_token": round(statistics.median(turn.readers_bytes / turn.readers_tokens for turn in turns), 1),
            "server_memory_mib": round(statistics.median(turn.server_bytes for turn in turns) / 2**20, 1),
        }
    return row


def compare(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return rates and times relative to their controls, and what waits for a slow reader.

    What the server cannot send yet is counted in bytes of events. It holds up to 64 KiB of them as such, and the rest as pieces
    of text.
    """
    alone, quick, slow, idle = rows
    waiting = slow["tokens_of_a_reader"] * (quick["taken_bytes_a_token"] - slow["taken_bytes_a_token"])
    return {
        "slow_to_quick_rate": round(slow["tokens_per_second"] / quick["tokens_per_second"], 3),
        "slow_minus_quick_first_token_ms": round(slow["first_token_ms"] - quick["first_token_ms"], 1),
        "idle_to_none_rate": round(idle["tokens_per_second"] / alone["tokens_per_second"], 3),
        "idle_minus_none_first_token_ms": round(idle["first_token_ms"] - alone["first_token_ms"], 1),
        "waiting_kib_of_a_slow_reader": round(waiting / 1024, 1),
        "more_memory_kib_of_a_slow_reader": round((slow["server_memory_mib"] - quick["server_memory_mib"]) * 1024 / READERS, 1),
    }


def main() -> None:
    """Measure, print and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    allow_connections(IDLE)
    with Engine.load(options.engine) as engine:
        prompts = new_prompts(engine)
    with Server(options.engine, "--served-model-name", _LONG_NAME, "--kv-tokens", str(KV_TOKENS)) as server:
        rows = measure(server, prompts)
    summary = compare(rows)
    print(json.dumps({"rows": rows, **summary}, indent=1))
    if options.out:
        facts = {"prompt_tokens": PROMPT, "answer_tokens": ANSWER, "rounds": ROUNDS * BATCHES, "engine": options.engine.name}
        result = {"machine": machine.describe(), **facts, "rows": rows, **summary}
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
