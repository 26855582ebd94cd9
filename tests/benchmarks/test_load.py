"""Servers under load: workloads, AIPerf's command line and records, tables, and server processes; nothing is timed.

Where AIPerf's environment has been made, one test runs it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tvm")  # the build extra, which the benchmarks need
pytest.importorskip("tomllib")  # Python 3.11, which the peers need

from belle_compile.compiler.driver import BuildRequest, build
from benchmarks.engines import SHAPES
from benchmarks.peers import servers
from benchmarks.peers.home import VENVS, PeersError
from benchmarks.processes import MACHINE, CpuMeter, cpu_seconds, descendants
from benchmarks.servers import NotReadyError, Server, ServerProcess
from benchmarks.serving import aiperf, report
from benchmarks.serving.__main__ import write_tokenizer
from benchmarks.serving.workloads import (
    LONGEST_QUESTION,
    SYSTEM_PROMPT,
    Closed,
    Poisson,
    Question,
    Workload,
    chats,
    read_questions,
    workloads,
    write_dataset,
)
from tests.parity.engines import BEST_ISA

QUESTIONS = [Question(f"question {number}", 16 + number) for number in range(30)]
GREEDY_USERS = Workload("users-2", Closed(2))


# Workloads


def test_arrivals_are_options_of_aiperf() -> None:
    assert Workload("a", Closed(16)).options()[:2] == ("--concurrency", "16")
    assert Workload("b", Poisson(2.5)).options() == ("--request-rate", "2.5", "--arrival-pattern", "poisson")
    cancelled = Workload("c", Closed(2), cancelled_percent=20, cancel_after_s=0.5).options()
    assert cancelled[-4:] == ("--request-cancellation-rate", "20", "--request-cancellation-delay", "0.5")


def test_every_kind_of_load_is_a_workload() -> None:
    every = workloads((1, 16), rate=3.0)
    assert [each.name for each in every][:3] == ["users-1", "users-16", "poisson"]
    assert not any(each.caches for each in every if each.name.startswith("users-"))
    assert any(each.repeats and each.shared_system_prompt and each.caches for each in every)
    assert any(each.turns > 1 for each in every) and any(each.cancelled_percent for each in every)


def test_chats_repeat_by_zipfs_law_and_share_a_system_prompt() -> None:
    workload = Workload("shared", Closed(4), repeats=True, shared_system_prompt=True)
    sent = chats(workload, QUESTIONS, 0, 600)
    assert sent == chats(workload, QUESTIONS, 0, 600) and len(sent) == 600
    counts = [count for _, count in Counter(chat.questions[0].text for chat in sent).most_common()]
    assert counts[0] > 2 * counts[5] > 0
    assert {chat.system for chat in sent} == {f"[0] {SYSTEM_PROMPT}"}
    assert {chat.system for chat in chats(workload, QUESTIONS, 1, 5)} == {f"[1] {SYSTEM_PROMPT}"}


def test_chats_without_repeats_ask_every_question_once_and_differ_from_round_to_round() -> None:
    first, second = (chats(GREEDY_USERS, QUESTIONS, number, len(QUESTIONS)) for number in (0, 1))
    assert {chat.questions[0].text for chat in first} == {f"[0] {question.text}" for question in QUESTIONS}
    assert all(a.questions[0].text[3:] == b.questions[0].text[3:] for a, b in zip(first, second, strict=True))
    assert not {chat.questions for chat in first} & {chat.questions for chat in second}


def test_chats_of_several_turns_are_written_as_such(tmp_path: Path) -> None:
    sent = chats(Workload("chats", Closed(2), turns=3), QUESTIONS, 0, 4)
    assert [len(chat.questions) for chat in sent] == [3] * 4
    write_dataset(sent, tmp_path / "chats.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "chats.jsonl").read_text().splitlines()]
    assert len({line["session_id"] for line in lines}) == 4
    assert lines[0]["turns"][0] == {"text": sent[0].questions[0].text, "output_length": sent[0].questions[0].answer_tokens}


def test_answers_are_as_long_as_the_expected_ones(tmp_path: Path) -> None:
    records = [
        {"question": "a", "std_answer": "x" * 30}, {"question": "b", "std_answer": ""}, {"question": "c"},
        {"question": "d", "std_answer": "x" * 500}, {"question": "x" * (LONGEST_QUESTION + 1)},
        {"question": "e", "std_answer": "x"},
    ]  # fmt: skip
    path = tmp_path / "requests.jsonl"
    path.write_text("\n".join(map(json.dumps, records)) + "\n\n")
    assert read_questions(path) == [("a", 30), ("b", 48), ("c", 48), ("d", 64), ("e", 16)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"question": "a"}\n{"text": "b"}', "line 2: expected a JSON object with a question"),
        ("[]", "line 1: expected a JSON object with a question"),
        ("", "has no question of at most 400 characters"),
    ],
)
def test_wrong_requests_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text(text)
    with pytest.raises(SystemExit, match=message):
        read_questions(path)


# AIPerf's records


def line(start: float, first: float, end: float, tokens: int = 11, **about: Any) -> str:
    """A record as AIPerf writes it, with moments in seconds; the request was due 5 ms before it started."""
    phase, error = about.pop("phase", "profiling"), about.pop("error", None)
    metadata = {
        "benchmark_phase": phase, "credit_issued_ns": int((start - 0.005) * 1e9), "request_start_ns": int(start * 1e9),
        "request_end_ns": int((end + 0.001) * 1e9), "was_cancelled": about.pop("cancelled", False),
    }  # fmt: skip
    metrics = {
        "time_to_first_token": {"value": 1e3 * (first - start), "unit": "ms"},
        "request_latency": {"value": 1e3 * (end - start), "unit": "ms"},
        "output_sequence_length": {"value": tokens, "unit": "tokens"},
        "input_sequence_length": {"value": 100, "unit": "tokens"},
    }  # fmt: skip
    if about.pop("good", False):
        metrics["good_request_count"] = {"value": 1, "unit": "requests"}
    answered = not metadata["was_cancelled"] and error is None
    return json.dumps({"metadata": metadata, "metrics": metrics if answered else {}, "error": error})


def records(path: Path, *lines: str) -> list[aiperf.Request]:
    path.write_text("\n".join(lines) + "\n")
    return aiperf.read_records(path)


@pytest.fixture
def meter() -> CpuMeter:
    with CpuMeter({"client": os.getpid(), "server": os.getpid()}) as running:
        time.sleep(0.02)
    return running


def test_rates_count_what_came_within_the_measured_time(tmp_path: Path, meter: CpuMeter) -> None:
    found = records(
        tmp_path / "records.jsonl",
        line(90, 91, 92, phase="warmup"),
        line(100, 101, 111, good=True),  # eleven tokens, one a second from 101 on
        line(105, 106, 116),  # four whole seconds of it before 110, and its first token
        line(106, 106, 106, cancelled=True),
        line(107, 107, 107, error={"code": 500, "message": "no"}),
    )
    assert [(each.answered, each.cancelled, each.failed) for each in found[2:]] == [(False, True, False), (False, False, True)]
    sample = aiperf.sample(found, 10.0, meter)
    assert sample.seconds == pytest.approx(10.0) and (sample.requests, sample.cancelled, sample.failed) == (2, 1, 1)
    assert sample.errors == {"500 no": 1}
    assert sample.output_tokens_per_second == pytest.approx((10 + 5) / 10, abs=1e-3)
    assert sample.requests_per_second == 0 and sample.good == 0.5
    assert sample.first_token_p50 == pytest.approx(1000) and sample.time_per_token_p99 == pytest.approx(1000)
    assert sample.latency_p50 == pytest.approx(11000) and sample.client_queue_p50 == pytest.approx(5, abs=0.01)
    later = aiperf.sample(found, 20.0, meter)
    assert later.seconds == pytest.approx(16.0) and later.requests_per_second == pytest.approx(2 / 16)
    assert later.output_tokens_per_second == pytest.approx(22 / 16)


def test_an_answer_of_one_token_has_no_time_per_token(tmp_path: Path) -> None:
    (request,) = records(tmp_path / "records.jsonl", line(1, 2, 2, tokens=1))
    assert request.token_s == 0 and request.tokens_within(0, 3) == 1 and request.tokens_within(3, 4) == 0


def test_a_run_without_answers_is_an_error(tmp_path: Path, meter: CpuMeter) -> None:
    found = records(tmp_path / "records.jsonl", line(1, 1, 1, error={"code": 400}), line(1, 1, 1, cancelled=True))
    with pytest.raises(aiperf.AIPerfError, match=r"no request was answered \(2 sent, 1 failed, the first with 400\)"):
        aiperf.sample(found, 5.0, meter)


# Tables


def result(**samples: Any) -> dict[str, Any]:
    sample = {
        "requests": 9, "failed": 1, "requests_per_second": 2.0, "output_tokens_per_second": 100.0, "good": 0.75,
        "client_cores": 0.5, "server_cores": 1.25, "other_cores": 0.1, "client_queue_p99": 7.5,
        **{f"{name}_{p}": 5.0 for name in ("first_token", "time_per_token", "latency") for p in ("p50", "p99")},
    }  # fmt: skip
    rows = [
        {"server": server, "workload": "users-16", "round": number, **sample, "output_tokens_per_second": rate}
        for server, rates in samples.items()
        for number, rate in enumerate(rates)
    ]
    return {
        "model": "m", "rounds": 3, "seconds": 5.0, "threads": 2, "questions": 30, "versions": {"aiperf": "aiperf 0.13.0"},
        "limits": {"first_token_s": 0.8, "token_s": 0.05},
        "workloads": {"users-16": Workload("users-16", Closed(16)).describe()},
        "servers": list(samples), "failed": {"ov": "no compiler"}, "samples": rows,
        "machine": {"processor": "a processor", "memory_gib": 8, "system": "Linux", "date": "2026-01-01"},
    }  # fmt: skip


def test_ratios_are_medians_of_rounds_that_both_have() -> None:
    found = result(ours=[100.0, 90.0, 80.0], theirs=[50.0, 0.0, 20.0])
    assert report.ratios(found, "users-16", "theirs") == [2.0, 4.0]
    found["samples"][0] = {"server": "ours", "workload": "users-16", "round": 0, "error": "AIPerf did not end"}
    assert report.ratios(found, "users-16", "theirs") == [4.0]
    page = report.markdown([found])
    assert "| theirs | 20 | 4.00 | 2.00 | 5.0, 5.0 |" in page and "| 75% | 1.25, 0.50, 0.10 | 7.5 | 3 |" in page
    assert "16 users, caches off." in page and "- ov: no compiler" in page and "- ours, users-16: AIPerf did not end" in page
    assert "within 0.8 s and 0.05 s a token" in page


def test_results_are_read_from_a_folder(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no .*\.json in"):
        report.write(tmp_path)
    (tmp_path / "m.json").write_text(json.dumps(result(ours=[1.0])))
    assert "## m" in report.write(tmp_path).read_text()


# Processes

CHILD = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
HTTP = f"{CHILD}; from http.server import SimpleHTTPRequestHandler as H, test; test(H, port=int(sys.argv[1]), bind='127.0.0.1')"


def gone(process: int) -> bool:
    """Whether a process ends within ten seconds, or has ended and waits for its parent."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def test_a_server_ends_with_what_it_has_started(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HTTP]
    with ServerProcess(lambda port: [*command, str(port)], "m", ready="/", ready_s=30, log=tmp_path / "log") as server:
        (child,) = descendants(server.process)
        assert set(cpu_seconds(server.process)) == {server.process, child}
        server.pause()
        end = time.monotonic() + 10
        while Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] != "T":  # a signal takes effect later
            assert time.monotonic() < end, "the child goes on"
            time.sleep(0.01)
        server.resume()
        server.wait()
    assert gone(server.process) and gone(child)


@pytest.mark.parametrize(
    ("program", "message"),
    [("raise SystemExit(3)", "ended with status 3"), (f"{CHILD}; import time; time.sleep(60)", "did not become ready in 1 s")],
)
def test_a_server_that_does_not_start_says_so(tmp_path: Path, program: str, message: str) -> None:
    server = ServerProcess(lambda port: [sys.executable, "-c", program], "m", ready_s=1, log=tmp_path / "log")
    with pytest.raises(NotReadyError, match=f"the server of m {message}, see .*log"), server:
        pass
    assert gone(server.process)


def test_processor_time_of_trees(meter: CpuMeter) -> None:
    with CpuMeter({"busy": os.getpid()}, every_s=0.01) as running:
        start, end = time.time(), time.time() + 0.3
        while time.time() < end:
            pass
    assert 0 < running.cores("busy", start, end) < 64 and running.cores(MACHINE, start, end) > 0
    assert meter.cores("client", 5.0, 5.0) == 0.0


# Servers of others


def test_committed_servers() -> None:
    found = servers.read_servers()
    ours, *others = found
    assert ours.row.is_ours and {each.peer for each in others} == {"vllm", "llama", "ov"}
    for each in found:
        for caches in (False, True):
            words = each.arguments(Path("engine"), "m", 4321, 2, 16, caches=caches)
            assert "4321" in words and not any("{" in word for word in words)
            assert any(word.endswith("engine") for word in words)
    assert all(servers.choose(found, shape) for shape in SHAPES)
    assert [each.peer for each in servers.choose(found, "llama-1b", ["belle", "vLLM bf16"])] == ["belle", "vllm"]
    with pytest.raises(PeersError, match="unknown"):
        servers.choose(found, "llama-1b", ["nothing"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[server]]\nname = "a"\nfast = true', "server 'a': unknown fast; expected some of name, peer"),
        ('[[server]]\nname = "a"\npeer = "vllm"\nbits = 8\nready = "/"', "server 'a' has no command"),
        ("[[server", "servers.toml: "),
    ],
)
def test_wrong_servers_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "servers.toml"
    path.write_text(text)
    with pytest.raises(PeersError, match=message):
        servers.read_servers(path)


def test_a_server_without_its_environment_says_how_to_make_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "VENVS", tmp_path)
    llama = next(each for each in servers.read_servers() if each.peer == "llama")
    with pytest.raises(PeersError, match=r"run benchmarks/peers/setup\.sh llama-server"):
        llama.engine(tmp_path)
    assert llama.environments == ("llama", "llama-server")


# AIPerf

PROGRAM = VENVS / "aiperf" / "bin" / "aiperf"


@pytest.mark.skipif(not PROGRAM.exists(), reason="benchmarks/peers/setup.sh aiperf has not been run here")
def test_aiperf_loads_a_server(tmp_path: Path) -> None:
    bloom = Path(__file__).parents[1] / "fixtures" / "tiny-bloom-trained"
    engine = build(BuildRequest(str(bloom), tmp_path / "engine", isas=(BEST_ISA,), drift=False))
    (tmp_path / "tokenizer").mkdir()
    tokenizer = write_tokenizer(engine, tmp_path / "tokenizer")
    workload = Workload("chats", Closed(2), shared_system_prompt=True, turns=2)
    sent = [
        chat._replace(system="Be brief.")
        for chat in chats(workload, [Question(f"q {number}", 4) for number in range(30)], 0, 50)
    ]
    with Server(engine) as server:
        found = aiperf.run(PROGRAM, server, workload, sent, tokenizer, tmp_path, 2.0)
    assert found.requests > 0 and found.failed == 0 and found.output_tokens_per_second > 0
    assert found.first_token_p50 > 0 and found.client_cores > 0 and found.server_cores > 0
