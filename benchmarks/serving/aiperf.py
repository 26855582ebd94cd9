"""AIPerf as the client: its command line, one run, and what its records say."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.home import last_line
from benchmarks.processes import MACHINE, CpuMeter
from benchmarks.servers import ServerProcess
from benchmarks.serving.workloads import Chat, Workload, write_dataset

FIRST_TOKEN_LIMIT_S, TOKEN_LIMIT_S = 0.8, 0.05  # the limit of goodput
_GRACE_S = 60.0  # in which answers that were begun may end
_STARTING_S = 180.0  # that AIPerf's own processes may take to start and to end
_FIELDS = {"temperature": 0, "ignore_eos": True}
_MOST_OF_ERROR = 200  # characters of a request's error


class AIPerfError(Exception):
    """A run that AIPerf did not finish, in one line."""


@dataclass(frozen=True)
class Sample:
    """One run of a workload on a server. Times are in milliseconds, rates are per second of the measured time.

    `time_per_token` is the mean time between the tokens of an answer, `client_queue` the time by which requests were sent later
    than they were due, which no other time contains. `good` is the share of requests within the limits of goodput. Cores are
    those busy on average: AIPerf's (`client`), on the same machine as the server, and those of what should not run meanwhile.
    `errors` maps what requests failed with to their number.
    """

    requests: int
    cancelled: int
    failed: int
    seconds: float
    requests_per_second: float
    output_tokens_per_second: float
    first_token_p50: float
    first_token_p99: float
    time_per_token_p50: float
    time_per_token_p99: float
    latency_p50: float
    latency_p99: float
    good: float
    good_requests_per_second: float
    prompt_tokens_mean: float
    client_queue_p50: float
    client_queue_p99: float
    client_cores: float
    server_cores: float
    other_cores: float
    errors: dict[str, int]

    def to_plain(self) -> dict[str, Any]:
        return {name: round(value, 4) if isinstance(value, float) else value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Request:
    """A record of AIPerf. Times are seconds of the wall clock; a request that was cancelled or failed has no answer.

    `error` says why it failed, and is empty if it did not.
    """

    issued: float
    started: float
    ended: float
    first_token: float | None
    output_tokens: int
    prompt_tokens: int
    good: bool
    cancelled: bool
    error: str

    @property
    def failed(self) -> bool:
        return bool(self.error)

    @property
    def answered(self) -> bool:
        return not self.cancelled and not self.failed and self.first_token is not None

    @property
    def latency_s(self) -> float:
        return self.ended - self.started

    @property
    def first_token_s(self) -> float:
        assert self.first_token is not None
        return self.first_token - self.started

    @property
    def token_s(self) -> float:
        """Mean time between the tokens; 0 for an answer of one token."""
        assert self.first_token is not None
        return (self.ended - self.first_token) / max(self.output_tokens - 1, 1)

    def tokens_within(self, start: float, end: float) -> float:
        """The tokens that came between two moments; those after the first are taken to come evenly."""
        if self.first_token is None:
            return 0.0
        rest, duration = self.output_tokens - 1, self.ended - self.first_token
        first = float(start <= self.first_token < end)
        inside = max(min(self.ended, end) - max(self.first_token, start), 0.0)
        return first + (rest * inside / duration if duration else rest * float(start <= self.ended < end))


def command(
    aiperf: Path, server: ServerProcess, workload: Workload, tokenizer: Path, folder: Path, seconds: float, system: str
) -> list[str]:
    """Return AIPerf's command line for a workload whose data set is in `folder`."""
    limits = f"time_to_first_token:{1000 * FIRST_TOKEN_LIMIT_S:g} inter_token_latency:{1000 * TOKEN_LIMIT_S:g}"
    system_prompt = folder / "system.txt"
    if system:
        system_prompt.write_text(system, encoding="utf-8")
    return [
        str(aiperf), "profile", "--model", server.model, "--url", server.url, "--endpoint-type", "chat", "--streaming",
        "--tokenizer", str(tokenizer), "--use-server-token-count", "--use-legacy-max-tokens",
        "--input-file", str(folder / "chats.jsonl"), "--custom-dataset-type", "multi-turn",
        "--dataset-sampling-strategy", "sequential", "--extra-inputs", json.dumps(_FIELDS), "--random-seed", "0",
        *(["--system-prompt-file", str(system_prompt)] if system else []), *workload.options(), "--goodput", limits,
        "--benchmark-duration", f"{seconds:g}", "--benchmark-grace-period", f"{_GRACE_S:g}",
        "--output-artifact-dir", str(folder / "out"), "--export-level", "records",
        "--ui", "none", "--workers-max", "1", "--record-processors", "1", "--no-gpu-telemetry", "--no-server-metrics",
    ]  # fmt: skip


def run(
    aiperf: Path,
    server: ServerProcess,
    workload: Workload,
    chats: Sequence[Chat],
    tokenizer: Path,
    folder: Path,
    seconds: float,
) -> Sample:
    """Send chats to a server for so many seconds. `tokenizer` is a directory of one in Transformers' format. Raises AIPerfError
    where AIPerf fails; every process that it has started ends with it."""
    write_dataset(chats, folder / "chats.jsonl")
    arguments = command(aiperf, server, workload, tokenizer, folder, seconds, chats[0].system)
    # With HF_HUB_OFFLINE, AIPerf takes even the path of a directory for the name of a model on the Hub.
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    log = folder / "aiperf.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
            cwd=folder,
        )
        try:
            with CpuMeter({"client": process.pid, "server": server.process}) as meter:
                status = process.wait(seconds + _GRACE_S + _STARTING_S)
        except subprocess.TimeoutExpired:
            raise AIPerfError("AIPerf did not end") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    records = folder / "out" / "profile_export.jsonl"
    if status or not records.is_file():
        raise AIPerfError(f"AIPerf: {_why(log.read_text(encoding='utf-8', errors='replace'), status)}")
    return sample(read_records(records), seconds, meter)


def _why(text: str, status: int) -> str:
    """The last error in what AIPerf has printed; its very last lines name files."""
    errors = [line for line in text.splitlines() if " ERROR " in line]
    return last_line(errors[-1], status) if errors else f"status {status} and no records, without an error"


def read_records(path: Path) -> list[Request]:
    """Read the measured requests of AIPerf's `profile_export.jsonl`."""
    records = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    return [_request(record) for record in records if record["metadata"]["benchmark_phase"] == "profiling"]


def _request(record: dict[str, Any]) -> Request:
    about, metrics = record["metadata"], record.get("metrics") or {}
    started, ended = about["request_start_ns"] / 1e9, about["request_end_ns"] / 1e9

    def value(name: str) -> float | None:
        found: float | None = metrics[name]["value"] if name in metrics else None
        return found

    first_token_ms, latency_ms = value("time_to_first_token"), value("request_latency")
    if latency_ms is not None:
        ended = started + latency_ms / 1e3  # the last token; the connection's end comes later
    return Request(
        issued=about["credit_issued_ns"] / 1e9,
        started=started,
        ended=ended,
        first_token=None if first_token_ms is None else started + first_token_ms / 1e3,
        output_tokens=int(value("output_sequence_length") or 0),
        prompt_tokens=int(value("input_sequence_length") or 0),
        good=bool(value("good_request_count")),
        cancelled=bool(about.get("was_cancelled")),
        error="" if about.get("was_cancelled") else _error(record.get("error")),
    )


def _error(details: dict[str, Any] | None) -> str:
    """AIPerf's error in one line."""
    if not details:
        return ""
    return " ".join(str(details[name]) for name in ("code", "type", "message") if details.get(name))[:_MOST_OF_ERROR]


def sample(requests: Sequence[Request], seconds: float, meter: CpuMeter) -> Sample:
    """Summarize a run: times of the requests that were answered, and rates within the `seconds` from the first request on.

    Later, when no new requests come, a server has less and less to do; what it does then counts in no rate.
    """
    if not any(request.answered for request in requests):
        why = next((f", the first with {request.error}" for request in requests if request.failed), "")
        failed = sum(request.failed for request in requests)
        raise AIPerfError(f"no request was answered ({len(requests)} sent, {failed} failed{why})")
    start = min(request.started for request in requests)
    end = min(start + seconds, max(request.ended for request in requests))
    answered = [request for request in requests if request.answered]
    within = [request for request in answered if request.ended <= end]

    def percentiles(values: Sequence[float]) -> tuple[float, float]:
        return tuple(1000 * float(x) for x in np.percentile(values, (50, 99)))  # type: ignore[return-value]

    first, token, latency = (
        percentiles([getattr(request, name) for request in answered]) for name in ("first_token_s", "token_s", "latency_s")
    )
    client, server = meter.cores("client", start, end), meter.cores("server", start, end)
    queue = percentiles([max(request.started - request.issued, 0.0) for request in requests])
    return Sample(
        requests=len(answered),
        cancelled=sum(request.cancelled for request in requests),
        failed=sum(request.failed for request in requests),
        seconds=end - start,
        requests_per_second=len(within) / (end - start),
        output_tokens_per_second=sum(request.tokens_within(start, end) for request in requests) / (end - start),
        first_token_p50=first[0],
        first_token_p99=first[1],
        time_per_token_p50=token[0],
        time_per_token_p99=token[1],
        latency_p50=latency[0],
        latency_p99=latency[1],
        good=sum(request.good for request in answered) / len(answered),
        good_requests_per_second=sum(request.good for request in within) / (end - start),
        prompt_tokens_mean=statistics.fmean(request.prompt_tokens for request in answered),
        client_queue_p50=queue[0],
        client_queue_p99=queue[1],
        client_cores=client,
        server_cores=server,
        other_cores=max(meter.cores(MACHINE, start, end) - client - server, 0.0),
        errors=dict(Counter(request.error for request in requests if request.failed)),
    )
