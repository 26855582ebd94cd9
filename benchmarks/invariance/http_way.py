"""Requests through the HTTP server of this process: their fields as JSON, and what the JSON of the answers says."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby
from typing import Any

from belle_compile.runtime import Engine
from belle_compile.runtime.server.app import create_app
from belle_compile.runtime.server.options import ServerOptions
from belle_compile.runtime.server.serve import Server
from belle_compile.runtime.server.service import Service
from belle_compile.runtime.serving.request import Request

CLIENTS = 16  # that send requests at the same time
_WAIT_S = 120
_AS_THEY_ARE = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens",
    "seed", "prompt_lookup", "prompt_logprobs", "logprobs",
)  # fmt: skip


def fields(requests: Sequence[Request]) -> dict[str, Any]:
    """Return the body of a completion that asks for these answers to one prompt."""
    request = requests[0]
    body: dict[str, Any] = {name: getattr(request, name) for name in _AS_THEY_ARE}
    body |= {"prompt": list(request.prompt), "max_tokens": request.max_new_tokens, "n": len(requests), "return_token_ids": True}
    body |= {"stop": list(request.stop), "stop_token_ids": list(request.stop_token_ids), "ignore_eos": not request.eos_ids}
    body["logit_bias"] = {str(token): bias for token, bias in request.logit_bias}
    if request.grammar:
        kind, source = request.grammar.kind, request.grammar.source
        forms = {"json_schema": {"json": source}, "regex": {"regex": source}, "json_object": {"json_object": True}}
        body["structured_outputs"] = forms[kind]
    return body


def ask(engine: Engine, requests: Sequence[Request], stream: bool) -> list[tuple[Any, list[Any]]]:
    """Send all requests, those for one prompt together. Returns for each answer its choice, or the choices of its events, as
    one list, in the order of the requests."""
    # Greedy answers to one prompt are equal requests; the others are numbered.
    groups = [list(group) for _, group in groupby(requests, key=lambda request: replace(request, answer=0))]
    with serving(engine) as port, ThreadPoolExecutor(CLIENTS) as clients:
        answered = clients.map(lambda group: _post(port, fields(group) | {"stream": stream}), groups)
        return [answer for choices in answered for answer in choices]


def _post(port: int, body: dict[str, Any]) -> list[tuple[Any, list[Any]]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_WAIT_S)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    text = response.read().decode()
    if response.status != 200:
        raise SystemExit(f"status {response.status} for {json.dumps(body)[:2000]}: {text}")
    if body["stream"]:
        events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
        assert events[-1] == "[DONE]", text[-500:]
        plain = [json.loads(event) for event in events[:-1]]
    else:
        plain = [json.loads(text)]
    choices = [choice for part in plain for choice in part["choices"]]
    prompt = next((scores for part in [*plain, *choices] if (scores := part.get("prompt_logprobs"))), None)
    return [(prompt, [choice for choice in choices if choice["index"] == index]) for index in range(body["n"])]


@contextlib.contextmanager
def serving(engine: Engine) -> Iterator[int]:
    """Serve an engine from another thread on a free port, which is returned."""
    service = Service(engine, ServerOptions())
    server = Server(create_app(service), service)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    end = time.monotonic() + _WAIT_S
    while not server.started and thread.is_alive() and time.monotonic() < end:
        time.sleep(0.01)
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(_WAIT_S)
        service.close()
