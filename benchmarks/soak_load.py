"""The requests of `benchmarks.soak`: plain sockets on an event loop, so that clients can leave, dawdle and misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from belle_compile.runtime import Engine, Grammar, SamplingParams

ADMIN_KEY = "soak"
LONGEST_S = 120.0  # after which a request is stuck
IDLE_S = 20.0  # for which an idle connection is held
CHATS, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
# How often each kind is sent, relative to the others.
KINDS = {
    "chat": 20,
    "completion": 20,
    "stream": 20,
    "grammar": 8,
    "long prompt": 6,
    "cancelled stream": 10,
    "bad request": 8,
    "slow reader": 4,
    "idle connection": 4,
}
_WORDS = "the river house of seven lights was open when a letter came from 北京 and 你好 said every friend".split()
_PATTERN = "[a-f]{4}-[0-9]{4}"
_BAD = (b"{", b'{"messages": 3}', b'{"prompt": "x", "max_tokens": -1}', b'{"prompt": "x", "regex": "["}', b"\xff")
_SLOW_S, _SLOW_READS, _SLOW_BYTES = 0.2, 40, 16


@dataclass(frozen=True)
class Answer:
    """A whole answer to a request, which can be computed again."""

    path: str
    body: dict[str, Any]
    text: str


class Load:
    """Makes and sends requests to a server."""

    def __init__(self, host: str, port: int, model: str, chance: random.Random) -> None:
        self.random = chance
        self._host, self._port, self._model = host, port, model

    def choose(self) -> str:
        """The kind of the next request."""
        return self.random.choices(list(KINDS), list(KINDS.values()))[0]

    async def send(self, kind: str) -> tuple[str, Answer | None]:
        """Send a request; returns its outcome, and its answer where that is whole and can be computed again."""
        if kind == "bad request":
            status, _ = await self.post(self.random.choice([CHATS, COMPLETIONS]), self.random.choice(_BAD), {})
            return ("refused" if 400 <= status < 500 else str(status)), None
        if kind == "idle connection":
            return await self._stay_idle(), None
        path, body = self.request_of(kind)
        if kind in ("cancelled stream", "slow reader"):
            return await self._read_badly(path, body, leave=kind == "cancelled stream"), None
        status, data = await self.post(path, body, {})
        if status != 200:
            return str(status), None
        return "answered", Answer(path, body, text_of(path, body, data))

    def request_of(self, kind: str) -> tuple[str, dict[str, Any]]:
        """A path and a body, of which some come again."""
        words = 300 if kind == "long prompt" else self.random.randint(2, 24)
        chance = random.Random(self.random.randint(0, 400)) if self.random.random() < 0.4 else self.random
        text = " ".join(chance.choice(_WORDS) for _ in range(words))
        body: dict[str, Any] = {"seed": chance.randint(0, 3), "max_tokens": chance.randint(4, 48)}
        if kind == "grammar":
            body |= {"regex": _PATTERN}
        if kind in ("stream", "cancelled stream", "slow reader"):
            body |= {"stream": True}
        if kind == "slow reader":
            body |= {"max_tokens": 64, "ignore_eos": True}
        if kind == "chat" or (kind == "stream" and chance.random() < 0.5):
            return CHATS, body | {"messages": [{"role": "user", "content": text}]}
        return COMPLETIONS, body | {"prompt": text}

    async def post(self, path: str, body: dict[str, Any] | bytes, headers: Mapping[str, str]) -> tuple[int, bytes]:
        """Send a request over a connection of its own; returns status and body. Raises `ConnectionError` where that breaks."""
        async with self._connection() as (reader, writer):
            writer.write(self._encoded(path, body, headers))
            return parse(await reader.read())

    async def _read_badly(self, path: str, body: dict[str, Any], *, leave: bool) -> str:
        """Read a stream a few bytes at a time, and leave amid it where that is wanted."""
        async with self._connection(limit=_SLOW_BYTES) as (reader, writer):
            writer.write(self._encoded(path, body, {}))
            for _ in range(self.random.randint(1, 8) if leave else _SLOW_READS):
                if not await reader.read(_SLOW_BYTES):
                    break
                await asyncio.sleep(0 if leave else _SLOW_S)
            return "left" if leave else "read slowly"

    async def _stay_idle(self) -> str:
        async with self._connection() as (reader, _):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(reader.read(1), IDLE_S)
                return "closed by the server"
            return "held"

    def _encoded(self, path: str, body: dict[str, Any] | bytes, headers: Mapping[str, str]) -> bytes:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = {"Host": self._host, "Content-Type": "application/json", "Content-Length": str(len(content))}
        lines |= {"Connection": "close", **headers}
        return (
            "\r\n".join([f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in lines.items()), "", ""]).encode()
            + content
        )

    @contextlib.asynccontextmanager
    async def _connection(self, limit: int = 1 << 16) -> Any:
        reader, writer = await asyncio.open_connection(self._host, self._port, limit=limit)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()


def parse(data: bytes) -> tuple[int, bytes]:
    """Return status and body of a response; raises `ConnectionError` for one that is not whole."""
    head, _, rest = data.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 "):
        raise ConnectionResetError("no response")
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    status = int(head.split()[1])
    if fields.get(b"transfer-encoding") != b"chunked":
        if len(rest) != int(fields.get(b"content-length", len(rest))):
            raise ConnectionResetError("a response breaks off")
        return status, rest
    body = b""
    while True:
        size, _, rest = rest.partition(b"\r\n")
        count = int(size or b"-1", 16)
        if count < 0 or len(rest) < count + 2:
            raise ConnectionResetError("a stream breaks off")
        if count == 0:
            return status, body
        body, rest = body + rest[:count], rest[count + 2 :]


def text_of(path: str, body: Mapping[str, Any], data: bytes) -> str:
    """The text of the answer in a response, streamed or not."""
    chats = path == CHATS
    if not body.get("stream"):
        choice = json.loads(data)["choices"][0]
        return str(choice["message"]["content"] if chats else choice["text"])
    events = [event.removeprefix(b"data: ") for event in data.split(b"\n\n") if event]
    if events.pop() != b"[DONE]":
        return f"a stream without an end: {data[-200:]!r}"
    choices = [choice for event in events for choice in json.loads(event)["choices"]]
    return "".join((choice["delta"].get("content") or "") if chats else choice["text"] for choice in choices)


def expected_text(engine: Engine, answer: Answer) -> str:
    """Compute an answer anew, alone."""
    body = answer.body
    grammar = Grammar("regex", body["regex"]) if "regex" in body else None
    params = SamplingParams(seed=body["seed"], max_new_tokens=body["max_tokens"], grammar=grammar)
    prompt = body["messages"] if answer.path == CHATS else body["prompt"]
    (result,) = engine.generate([engine.encode(prompt, raw=True)], params)
    return result.text
