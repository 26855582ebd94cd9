"""What HTTP costs: streaming connections against `Engine.generate` with as many prompts, in turns on the same cores.

    python -m benchmarks.server_overhead ENGINE [--out benchmarks/results/server-overhead.json]

`belle-run serve` runs in a process of its own. This process holds an engine too, and the clients: plain sockets that do nothing
but read, so that little of what is measured is theirs. Every prompt is new, so that no cache helps. A rate is all tokens of a
round by the time from the first request to the end of the last answer.
"""

from __future__ import annotations

import argparse
import json
import re
import select
import socket
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from belle_compile.runtime import Engine, SamplingParams
from benchmarks import machine
from benchmarks.servers import Server

CONNECTIONS = (1, 4, 16, 64)
PROMPT, ANSWER, ROUNDS = 64, 96, 7
_ANSWER_S = 60  # in which a stream must go on
_WORD = re.compile(r" ?[A-Za-z]{3,}")
PARAMS = SamplingParams(temperature=0, repetition_penalty=1.0, max_new_tokens=ANSWER, ignore_eos=True)


class Round(NamedTuple):
    """Tokens per second of all answers together, and the median of the seconds to their first tokens."""

    rate: float
    first_token_s: float


def generate(engine: Engine, prompts: list[list[int]]) -> Round:
    """Answer all prompts in this process."""
    started = time.perf_counter()
    results = engine.generate(prompts, PARAMS)
    seconds = time.perf_counter() - started
    tokens = sum(len(result.token_ids) for result in results)
    return Round(tokens / seconds, statistics.median(result.timings.first_token_s for result in results))


def stream(server: Server, prompts: list[list[int]]) -> Round:
    """Stream all answers, each over a connection of its own that is open already."""
    streams = {each.fileno(): each for each in (_Stream(server, prompt) for prompt in prompts)}
    with select.epoll() as poll:
        started = time.perf_counter()
        for number, each in streams.items():
            each.ask()
            poll.register(number, select.EPOLLIN)
        reading = len(streams)
        while reading:
            for number, _ in poll.poll(_ANSWER_S) or _late():
                if not streams[number].read():
                    poll.unregister(number)
                    reading -= 1
    seconds = time.perf_counter() - started
    return Round(len(prompts) * ANSWER / seconds, statistics.median(each.close() for each in streams.values()))


class _Stream:
    """A streamed answer on a plain socket: the client, which runs on the same cores, is to cost little beside the server."""

    def __init__(self, server: Server, prompt: list[int]) -> None:
        self._socket = socket.create_connection((server.host, server.port))
        self._request = request_of(server, prompt)
        self._started = self._first_s = 0.0
        self._end = b""

    def fileno(self) -> int:
        return self._socket.fileno()

    def ask(self) -> None:
        """Send the request."""
        self._started = time.perf_counter()
        self._socket.sendall(self._request)

    def read(self) -> bool:
        """Read what has come; returns whether more will come."""
        data = self._socket.recv(1 << 16)
        if not self._first_s and b"data: " in data:
            self._first_s = time.perf_counter() - self._started
        self._end = (self._end + data)[-64:]
        return bool(data)

    def close(self) -> float:
        """Check that the answer is whole; returns the seconds to its first event."""
        self._socket.close()
        if b"data: [DONE]" not in self._end:
            raise SystemExit(f"a stream ended with {self._end!r}, not with [DONE]")
        return self._first_s


def _late() -> NoReturn:
    raise SystemExit(f"no stream went on within {_ANSWER_S} s")


def request_of(server: Server, prompt: list[int], answer: int = ANSWER, model: str | None = None) -> bytes:
    """Return the HTTP request for a stream of `answer` greedy tokens; `model` is another name of the server's model."""
    body = {"model": model or server.model, "prompt": prompt, "max_tokens": answer, "temperature": 0, "repetition_penalty": 1.0}
    content = json.dumps(body | {"ignore_eos": True, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {server.host}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode() + content


def new_prompts(engine: Engine) -> Callable[[int], list[list[int]]]:
    """Return a function that returns so many prompts which it has not returned before.

    They are made of words: the answers then are, too, and the text of each token can be sent at once. That of tokens which end
    amid a character is sent with the next token, which would be measured as a later first token.
    """
    chance, tokens = np.random.default_rng(0), engine.tokenizer
    words = [token for token in range(engine.executor.vocab_size) if _WORD.fullmatch(tokens.decode([token]))]

    def prompts(count: int) -> list[list[int]]:
        return chance.choice(words, (count, PROMPT)).tolist()  # type: ignore[no-any-return]

    return prompts


def measure(engine: Engine, server: Server) -> list[dict[str, Any]]:
    """Return one row for each number of connections."""
    prompts, rows = new_prompts(engine), []
    for count in CONNECTIONS:
        pairs = []
        for turn in range(ROUNDS + 1):  # the first one warms up
            taken: dict[str, Round] = {}
            for way in ("engine", "http") if turn % 2 else ("http", "engine"):
                new = prompts(count)
                taken[way] = generate(engine, new) if way == "engine" else stream(server, new)
            pairs.append((taken["engine"], taken["http"]))
        rows.append(_row(count, pairs[1:]))
        print(json.dumps(rows[-1]), flush=True)
    return rows


def _row(count: int, pairs: list[tuple[Round, Round]]) -> dict[str, Any]:
    def median(values: list[float]) -> float:
        return round(statistics.median(values), 4)

    return {
        "connections": count,
        "engine_tokens_per_second": median([engine.rate for engine, _ in pairs]),
        "http_tokens_per_second": median([http.rate for _, http in pairs]),
        "rate_ratio": median([http.rate / engine.rate for engine, http in pairs]),
        "first_token_more_ms": median([1000 * (http.first_token_s - engine.first_token_s) for engine, http in pairs]),
        "engine_first_token_ms": median([1000 * engine.first_token_s for engine, _ in pairs]),
    }


def main() -> None:
    """Measure, print and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with Server(options.engine) as server, Engine.load(options.engine) as engine:
        rows = measure(engine, server)
    if options.out:
        facts = {"prompt_tokens": PROMPT, "answer_tokens": ANSWER, "rounds": ROUNDS, "engine": options.engine.name}
        result = {"machine": machine.describe(), **facts, "rows": rows}
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
