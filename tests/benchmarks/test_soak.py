"""The parts of the soak: what a client makes of responses, what is noted of a process, and what is found wrong."""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import Sequence

import pytest

from benchmarks.soak import Sample, faults_of, sample
from benchmarks.soak_load import COMPLETIONS, KINDS, Answer, Load, expected_text, parse, text_of
from tests.runtime.server.serving import listening, serving


def samples_of(resident: Sequence[int], descriptors: int = 20, threads: int = 9) -> list[Sample]:
    """Samples a minute apart, of which the last one has these descriptors and threads, the others 20 and 9."""
    last = len(resident) - 1
    return [
        Sample(60.0 * n, each, descriptors if n == last else 20, threads if n == last else 9, 0, 0, {})
        for n, each in enumerate(resident)
    ]


def test_memory_may_grow_in_the_first_minutes_only() -> None:
    flat = [100, 400, 800, 900, 950, 1000, 1010, 1019]
    assert faults_of(samples_of(flat), Counter()) == []
    (fault,) = faults_of(samples_of([*flat, 1030]), Counter())
    assert fault == "resident memory has grown by 3.0% since 300 s, expected at most 2%"


def test_descriptors_threads_and_answers_that_are_lost_or_wrong() -> None:
    flat = [1000] * 8
    assert "descriptors" in faults_of(samples_of(flat, descriptors=120), Counter())[0]
    assert "threads" in faults_of(samples_of(flat, threads=40), Counter())[0]
    outcomes = Counter({"chat: stuck": 2, "recomputed: wrong": 1, "chat: answered": 9, "recomputed: right": 3})
    assert faults_of(samples_of(flat), outcomes) == ["2 requests: chat: stuck", "1 requests: recomputed: wrong"]
    assert faults_of([], outcomes), "a short run is judged by its answers"


def test_a_process_is_looked_at() -> None:
    before = sample(os.getpid(), 1.0, {"running": 2, "waiting": 3}, Counter({"b": 1, "a": 2}))
    with open(os.devnull, encoding="utf-8"):
        after = sample(os.getpid(), 2.0, {"running": 0, "waiting": 0}, Counter())
    assert after.descriptors == before.descriptors + 1 and before.threads >= 1 and before.resident_bytes > 10 << 20
    assert (before.running, before.waiting, list(before.requests)) == (2, 3, ["a", "b"])


def test_responses_that_break_off_are_no_answers() -> None:
    whole = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    assert parse(whole) == (200, b"abc")
    assert parse(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 2\r\n\r\nno") == (400, b"no")
    for data in (b"", whole[:-5], whole[:-9], b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nno"):
        with pytest.raises(ConnectionError):
            parse(data)


def test_a_stream_without_its_end_is_no_answer() -> None:
    event = b'data: {"choices": [{"text": "a"}]}\n\n'
    assert text_of(COMPLETIONS, {"stream": True}, event + event + b"data: [DONE]\n\n") == "aa"
    assert "without an end" in text_of(COMPLETIONS, {"stream": True}, event)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("idle connection", "long prompt")])
def test_each_kind_is_sent_and_answers_are_computed_again(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.soak_load._WORDS", ["a", "b"])  # prompts that fit
    monkeypatch.setattr("benchmarks.soak_load._SLOW_S", 0.001)

    async def send(host: str, port: int) -> tuple[str, Answer | None]:
        load = Load(host, port, "tiny", random.Random(4))
        return await asyncio.wait_for(load.send(kind), 20)

    with serving() as service, listening(service) as url:
        host, _, port = url.removeprefix("http://").partition(":")
        outcome, answer = asyncio.run(send(host, int(port)))
        if kind in ("chat", "completion", "stream", "grammar"):
            assert outcome == "answered" and answer and expected_text(service.engine, answer) == answer.text
        else:
            assert answer is None and outcome in ("refused", "left", "read slowly")
