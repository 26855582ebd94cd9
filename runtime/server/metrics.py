"""What /metrics shows, by the names and with the buckets of vLLM: its dashboards fit once `vllm:` is replaced by `belle:`."""

from __future__ import annotations

import statistics
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from belle_compile import __version__
from belle_compile.runtime.engine import Engine
from belle_compile.runtime.program import BLOCK_SIZE
from belle_compile.runtime.server.histogram import Histogram, one_two_five
from belle_compile.runtime.serving.result_cache.store import CacheStats
from belle_compile.runtime.serving.telemetry import AdapterStats, End, EngineStats, RequestRecord, StepRecord, combine

PREFIX = "belle:"
CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

_FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0,
    2560.0,
)  # fmt: skip
_TOKEN_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_REQUEST_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0,
    7680.0,
)  # fmt: skip
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_TOKENS = one_two_five(100_000)

# Name, meaning and buckets of each histogram. vLLM has all but `step_time_seconds`.
HISTOGRAMS: dict[str, tuple[str, tuple[float, ...]]] = {
    "time_to_first_token_seconds": ("From a request's arrival to its first token.", _FIRST_TOKEN_S),
    "inter_token_latency_seconds": ("Between two tokens of an answer.", _TOKEN_S),
    "request_time_per_output_token_seconds": ("Mean time between the tokens of an answer.", _TOKEN_S),
    "e2e_request_latency_seconds": ("From a request's arrival to its end.", _REQUEST_S),
    "request_queue_time_seconds": ("From a request's arrival to its first step.", _REQUEST_S),
    "request_prefill_time_seconds": ("From a request's first step to its first token.", _REQUEST_S),
    "request_decode_time_seconds": ("From a request's first token to its last.", _REQUEST_S),
    "request_inference_time_seconds": ("From a request's first step to its last token.", _REQUEST_S),
    "iteration_tokens_total": ("Tokens of a step.", _STEP_TOKENS),
    "request_prompt_tokens": ("Tokens of a prompt.", _TOKENS),
    "request_generation_tokens": ("Tokens of an answer.", _TOKENS),
    "request_params_max_tokens": ("The field max_tokens of a request.", _TOKENS),
    "request_params_n": ("The field n of a request.", (1, 2, 5, 10, 20)),
    "step_time_seconds": ("Wall time of a step, with scheduling and sampling.", _TOKEN_S),
}
# Name, meaning and source of each gauge and counter that the engine keeps. vLLM has those of the first block.
GAUGES: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "num_requests_running": ("Answers that are being generated.", lambda stats: stats.running),
    "num_requests_waiting": ("Answers that wait for their first step, or to go on.", lambda stats: stats.waiting),
    "kv_cache_usage_perc": ("Share of the KV cache's blocks in use, 0 to 1.", lambda s: s.kv_blocks_used / s.kv_blocks),
    "kv_cache_cached_perc": (
        "Share of the blocks that are kept for later prompts, 0 to 1.",
        lambda stats: stats.kv_blocks_cached / stats.kv_blocks,
    ),
}
COUNTERS: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "num_preemptions": ("Times that an answer gave up its blocks to another one.", lambda stats: stats.preemptions),
    "prefix_cache_queries": ("Tokens of prompts that were looked up in the prefix cache.", lambda stats: stats.prefix_queries),
    "prefix_cache_hits": ("Tokens of prompts that came from the prefix cache.", lambda stats: stats.prefix_hits),
    "prompt_tokens": ("Tokens of prompts that were computed.", lambda stats: stats.prompt_tokens),
    "generation_tokens": ("Tokens of answers that were generated.", lambda stats: stats.generated_tokens),
    "spec_decode_num_draft_tokens": ("Tokens that were guessed and verified.", lambda stats: stats.drafted_tokens),
    "spec_decode_num_accepted_tokens": ("Guessed tokens that were right.", lambda stats: stats.accepted_tokens),
    "recomputed_tokens": ("Tokens that were computed again after a preemption.", lambda stats: stats.recomputed_tokens),
    "kv_cache_evictions": ("Blocks kept for later prompts that made room for others.", lambda stats: stats.evictions),
    "queue_refusals": ("Requests that found the queue full, or its wait too long.", lambda stats: stats.refusals),
    "cancellations": ("Requests that were cancelled.", lambda stats: stats.cancellations),
    "deadlines_missed": ("Requests whose time was over before they were complete.", lambda stats: stats.deadlines_missed),
    "steps": ("Steps that were run.", lambda stats: stats.steps),
}
# How vLLM calls the ends of requests; it has none for a deadline.
FINISHED_REASONS: dict[End, str] = {
    "stop": "stop",
    "length": "length",
    "cancelled": "abort",
    "deadline": "deadline",
    "error": "error",
}
_RECENT = 256  # requests that the medians are of


@dataclass(frozen=True)
class Medians:
    """Medians over the last requests, in seconds: to the first token, a token after it, in all. None before the first."""

    first_token_s: float | None
    token_s: float | None
    total_s: float | None


class Metrics:
    """Collects what the engine reports (`Telemetry`) and what the server counts, in a registry of its own.

    Prometheus reads the engine's own counts when it asks for them.
    """

    def __init__(self) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        self.connections = 0  # open ones; set by the server's loop
        self._histograms = {name: Histogram(bounds) for name, (_, bounds) in HISTOGRAMS.items()}
        self._recent: deque[RequestRecord] = deque(maxlen=_RECENT)
        self._engines: tuple[Engine, ...] = ()  # those that answer requests, the one that new requests get at the end
        self._past: EngineStats | None = None  # of engines that were replaced
        self._engines_lock = threading.Lock()
        self._by_adapter: Counter[tuple[str, End]] = Counter()  # requests that have ended, by name and end
        self._tokens_by_adapter: Counter[str] = Counter()  # tokens of their answers
        self._labels: dict[str, str] = {}
        self._infos: dict[str, dict[str, str]] = {}
        self._requests = prometheus_client.Counter(
            f"{PREFIX}http_requests", "HTTP requests.", ("method", "handler", "status"), registry=self.registry
        )
        self._durations = prometheus_client.Histogram(
            f"{PREFIX}http_request_duration_seconds", "From an HTTP request's headers to the end of its response.",
            ("method", "handler"), buckets=_FIRST_TOKEN_S, registry=self.registry,
        )  # fmt: skip
        self._refused = prometheus_client.Counter(
            f"{PREFIX}http_connections_refused", "Connections that were refused, for there were too many.",
            registry=self.registry,
        )  # fmt: skip
        prometheus_client.ProcessCollector(registry=self.registry)
        self.registry.register(self)

    def attach(self, model: str, engine: Engine) -> None:
        """Show the counts of an engine, as those of the model of this name, beside those of the engines before it."""
        self._labels = {"model_name": model, "engine": "0"}
        target = engine.manifest.target
        self._infos = {
            "build_info": {
                "version": __version__,
                "digest": engine.identity.digest,
                "kernels": engine.identity.kernels,
                "target": target.name,
                "ranks": str(target.ranks),
            },
            "cache_config_info": {"block_size": str(BLOCK_SIZE), "num_blocks": str(engine.executor.num_blocks)},
        }
        with self._engines_lock:
            self._engines = (*self._engines, engine)

    def detach(self, engine: Engine) -> None:
        """Keep the counts of an engine that answers no more requests, and is about to be closed."""
        with self._engines_lock:
            self._past = combine(self._past, replace(engine.stats(), running=0, waiting=0, adapters=None))
            self._engines = tuple(other for other in self._engines if other is not engine)

    def stats(self) -> EngineStats:
        """The counts of all engines that were attached, together. There must be one."""
        with self._engines_lock:
            stats = self._past
            for engine in self._engines:
                stats = combine(stats, engine.stats())
        assert stats is not None, "an engine was attached"
        return stats

    def step(self, record: StepRecord) -> None:
        """Take notice of a step."""
        self._observe("iteration_tokens_total", record.tokens)
        self._observe("step_time_seconds", record.seconds)
        if record.token_gaps:
            self._histograms["inter_token_latency_seconds"].observe(record.token_gaps)

    def ended(self, record: RequestRecord) -> None:
        """Take notice of a request that has ended. What took no time did not happen."""
        tokens = record.generated_tokens
        self._observe("request_prompt_tokens", record.prompt_tokens)
        self._observe("request_generation_tokens", tokens)
        times = {
            "e2e_request_latency_seconds": record.total_s,
            "time_to_first_token_seconds": record.first_token_s,
            "request_queue_time_seconds": record.queue_s,
            "request_prefill_time_seconds": record.prefill_s,
            "request_decode_time_seconds": record.decode_s,
            "request_inference_time_seconds": record.prefill_s + record.decode_s,
            "request_time_per_output_token_seconds": record.decode_s / (tokens - 1) if tokens > 1 else 0,
        }
        for name, seconds in times.items():
            if seconds > 0:
                self._observe(name, seconds)
        names = [name for each in self._engines if each.adapters for name in each.adapters.names({record.adapter})]
        for name in names[:1]:
            self._by_adapter[name, record.end] += 1
            self._tokens_by_adapter[name] += tokens
        self._recent.append(record)

    def asked(self, n: int, max_tokens: int | None) -> None:
        """Take notice of the fields of a request over HTTP."""
        self._observe("request_params_n", n)
        if max_tokens is not None:
            self._observe("request_params_max_tokens", max_tokens)

    def responded(self, method: str, handler: str, status: int, seconds: float) -> None:
        """Take notice of a response. `handler` is the path of the route, with names in place of what varies."""
        method = method if method in METHODS else "other"
        self._requests.labels(method, handler, str(status)).inc()
        self._durations.labels(method, handler).observe(seconds)

    def refused_connection(self) -> None:
        """Take notice of a connection that was refused."""
        self._refused.inc()

    def medians(self) -> Medians:
        """Return medians over the last 256 requests."""
        recent = list(self._recent)
        tokens = [record.decode_s / (record.generated_tokens - 1) for record in recent if record.generated_tokens > 1]
        first = [record.first_token_s for record in recent if record.first_token_s > 0]
        return Medians(_median(first), _median([value for value in tokens if value > 0]), _median([r.total_s for r in recent]))

    def exposition(self) -> bytes:
        """Everything in Prometheus' text format, `CONTENT_TYPE`."""
        return prometheus_client.generate_latest(self.registry)

    def describe(self) -> Iterator[Metric]:
        """The names are unique, which the registry would collect all metrics to check."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """The metrics of the engine, once it is attached, and the connections."""
        yield GaugeMetricFamily(f"{PREFIX}http_connections", "Open connections.", value=self.connections)
        if not self._engines:
            return
        stats = self.stats()
        for name, (meaning, gauge) in GAUGES.items():
            yield self._metric(GaugeMetricFamily, name, meaning, gauge(stats))
        for name, (meaning, counter) in COUNTERS.items():
            yield self._metric(CounterMetricFamily, name, meaning, counter(stats))
        ends = CounterMetricFamily(
            f"{PREFIX}request_success", "Requests that have ended, by how.", labels=(*self._labels, "finished_reason")
        )
        for end, reason in FINISHED_REASONS.items():
            ends.add_metric((*self._labels.values(), reason), stats.requests[end])
        yield ends
        yield from self._of_adapters(stats.adapters) if stats.adapters else ()
        yield from self._result_cache(stats.result_cache or CacheStats())
        for name, (meaning, _) in HISTOGRAMS.items():
            buckets, total = self._histograms[name].cumulative()
            family = HistogramMetricFamily(PREFIX + name, meaning, labels=tuple(self._labels))
            family.add_metric(tuple(self._labels.values()), buckets, total)
            yield family
        for name, facts in self._infos.items():
            info = GaugeMetricFamily(PREFIX + name, "Facts, as labels of the number 1.", labels=(*self._labels, *facts))
            info.add_metric((*self._labels.values(), *facts.values()), 1)
            yield info

    def _of_adapters(self, stats: AdapterStats) -> Iterator[Metric]:
        """What vLLM says of adapters: those in use, as labels of the time. Beside it, counts of each adapter by its name."""
        facts = {
            "max_lora": str(stats.slots),
            "running_lora_adapters": ",".join(stats.running),
            "waiting_lora_adapters": ",".join(stats.waiting),
        }
        meaning = "Adapters of requests that run and wait, as labels of the time in seconds since 1970."
        info = GaugeMetricFamily(f"{PREFIX}lora_requests_info", meaning, labels=(*self._labels, *facts))
        info.add_metric((*self._labels.values(), *facts.values()), time.time())
        yield info
        labels = (*self._labels, "lora_name")
        meaning = "Requests with an adapter that have ended, by its name and how."
        ends = CounterMetricFamily(f"{PREFIX}lora_request_success", meaning, labels=(*labels, "finished_reason"))
        for (name, end), count in list(self._by_adapter.items()):
            ends.add_metric((*self._labels.values(), name, FINISHED_REASONS[end]), count)
        yield ends
        meaning = "Tokens of answers of requests with an adapter that have ended, by its name."
        tokens = CounterMetricFamily(f"{PREFIX}lora_generation_tokens", meaning, labels=labels)
        for name, count in list(self._tokens_by_adapter.items()):
            tokens.add_metric((*self._labels.values(), name), count)
        yield tokens

    def _result_cache(self, stats: CacheStats) -> Iterator[Metric]:
        lookups = stats.hits + stats.misses + stats.shared
        meaning = "Requests that were looked up in the result cache."
        yield self._metric(CounterMetricFamily, "result_cache_lookups", meaning, lookups)
        for field in fields(CacheStats):
            family = GaugeMetricFamily if field.name == "bytes" else CounterMetricFamily
            meaning = f"The result cache's count of {field.name.replace('_', ' ')}."
            yield self._metric(family, f"result_cache_{field.name}", meaning, getattr(stats, field.name))

    def _metric(self, family: Any, name: str, meaning: str, value: float) -> Metric:
        metric: Any = family(PREFIX + name, meaning, labels=tuple(self._labels))
        metric.add_metric(tuple(self._labels.values()), value)
        result: Metric = metric
        return result

    def _observe(self, name: str, value: float) -> None:
        self._histograms[name].observe((value,))


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None
