"""A small server of OpenAI's chat API around OpenVINO GenAI's ContinuousBatchingPipeline, which has none of its own in Python.

    python openvino_server.py ENGINE --port PORT --model NAME --threads N --users N [--prefix-cache]

It runs under the interpreter of the `ov` environment, with nothing but the standard library beside OpenVINO. Chats are answered
greedily, streamed or whole; a client that goes away ends its request. One thread runs the pipeline's steps and hands the new
tokens of each to the threads of the connections.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import threading
import traceback
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import openvino_genai

CACHE_GB = 2  # of keys and values
Tokens = list[int]


class Answer:
    """The tokens of an answer as they come, None after the last, and whether nobody waits for them any more."""

    def __init__(self) -> None:
        self.received: queue.SimpleQueue[Tokens | None] = queue.SimpleQueue()
        self.given_up = False


class Pipeline:
    """The pipeline and the thread that runs its steps."""

    def __init__(self, engine: str, threads: int, users: int, prefix_cache: bool) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size, scheduler.max_num_seqs, scheduler.enable_prefix_caching = CACHE_GB, users, prefix_cache
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(engine, scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads})
        self.tokenizer = self._pipeline.get_tokenizer()
        self._waiting: queue.SimpleQueue[tuple[str, Any, Answer]] = queue.SimpleQueue()
        threading.Thread(target=self._run_or_end, daemon=True).start()

    def answer(self, prompt: str, tokens: int, ignore_eos: bool) -> Generator[Tokens, None, None]:
        """Yield the new tokens of each step; leaving the loop gives the request up."""
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.do_sample, config.ignore_eos = tokens, False, ignore_eos
        answer = Answer()
        self._waiting.put((prompt, config, answer))
        try:
            while (new := answer.received.get()) is not None:
                yield new
        finally:
            answer.given_up = True

    def _run_or_end(self) -> None:
        """Run steps for ever; a failure ends the server, whose clients would wait for ever otherwise."""
        try:
            self._run()
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    def _run(self) -> None:
        running: dict[int, tuple[Any, Answer]] = {}
        count = 0
        while True:
            while not running or not self._waiting.empty():
                prompt, config, answer = self._waiting.get()
                running[count] = self._pipeline.add_request(count, prompt, config), answer
                count += 1
            self._pipeline.step()
            for number, (handle, answer) in list(running.items()):
                while handle.can_read():
                    for output in handle.read().values():
                        answer.received.put(list(output.generated_ids))
                if answer.given_up:
                    handle.cancel()
                if handle.get_status() != openvino_genai.GenerationStatus.RUNNING:
                    answer.received.put(None)
                    del running[number]


class Handler(BaseHTTPRequestHandler):
    """Requests of one connection."""

    protocol_version = "HTTP/1.1"
    pipeline: Pipeline
    model: str

    def do_GET(self) -> None:
        self._send(200 if self.path == "/health" else 404, {})

    def do_POST(self) -> None:
        if self.path != "/v1/chat/completions":
            self._send(404, {})
            return
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = self.pipeline.tokenizer.apply_chat_template(body["messages"], True)
        usage = {"prompt_tokens": int(self.pipeline.tokenizer.encode(prompt).input_ids.shape[1])}
        limit = int(body.get("max_completion_tokens") or body.get("max_tokens") or 256)
        answer = self.pipeline.answer(prompt, limit, bool(body.get("ignore_eos")))
        if body.get("stream"):
            with contextlib.closing(answer), contextlib.suppress(ConnectionError):
                self._stream(answer, usage)
            return
        tokens = [token for new in answer for token in new]
        message = {"role": "assistant", "content": self.pipeline.tokenizer.decode(tokens), "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
        self._send(200, self._object("chat.completion", [choice]) | {"usage": self._usage(usage, len(tokens))})

    def _stream(self, answer: Generator[Tokens, None, None], usage: dict[str, int]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        tokens: Tokens = []
        sent = ""
        for new in answer:
            tokens += new
            text = self.pipeline.tokenizer.decode(tokens)
            if not text.endswith("\ufffd") and len(text) > len(sent):  # otherwise a character is not complete yet
                self._event(self._object("chat.completion.chunk", [self._delta({"content": text[len(sent) :]}, None)]))
                sent = text
        self._event(self._object("chat.completion.chunk", [self._delta({}, "stop")]))
        self._event(self._object("chat.completion.chunk", []) | {"usage": self._usage(usage, len(tokens))})
        self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": "0", "object": kind, "created": 0, "model": self.model, "choices": choices}

    @staticmethod
    def _delta(delta: dict[str, str], reason: str | None) -> dict[str, Any]:
        return {"index": 0, "delta": delta, "finish_reason": reason}

    @staticmethod
    def _usage(usage: dict[str, int], tokens: int) -> dict[str, int]:
        return usage | {"completion_tokens": tokens, "total_tokens": usage["prompt_tokens"] + tokens}

    def _event(self, value: dict[str, Any]) -> None:
        self._chunk(b"data: " + json.dumps(value).encode() + b"\n\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def _send(self, status: int, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


class Server(ThreadingHTTPServer):
    """Takes as many connections at once as there are users."""

    daemon_threads = True
    request_queue_size = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--users", type=int, required=True)
    parser.add_argument("--prefix-cache", action="store_true")
    arguments = parser.parse_args()
    Handler.pipeline = Pipeline(arguments.engine, arguments.threads, arguments.users, arguments.prefix_cache)
    Handler.model = arguments.model
    Server(("127.0.0.1", arguments.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
