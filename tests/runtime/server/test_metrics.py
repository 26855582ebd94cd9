"""What /metrics shows, and that the dashboard asks for nothing else."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from belle_compile import __version__
from belle_compile.runtime.program import BLOCK_SIZE
from belle_compile.runtime.server.histogram import Histogram, one_two_five
from belle_compile.runtime.server.metrics import METHODS, PREFIX, Metrics
from belle_compile.runtime.serving.result_cache.store import CacheStats
from belle_compile.runtime.serving.telemetry import AdapterStats, EngineStats, RequestRecord, StepRecord, combine
from tests.runtime.fakes import make_engine

STATS = EngineStats(
    running=3, waiting=2, preemptions=5, recomputed_tokens=70, refusals=1,
    kv_blocks=16, kv_blocks_used=4, kv_blocks_cached=8, evictions=9, prefix_hits=100, prefix_queries=400,
    prompt_tokens=1000, generated_tokens=2000, steps=50,
    requests={"stop": 7, "length": 8, "cancelled": 4, "deadline": 6, "error": 0},
    last_step_at=None, result_cache=CacheStats(hits=11, misses=12, shared=1, audits=2, audit_differences=1, bytes=512),
    drafted_tokens=40, accepted_tokens=30,
)  # fmt: skip


def make_metrics() -> Metrics:
    metrics = Metrics()
    with make_engine() as engine:
        engine.stats = lambda: STATS  # type: ignore[method-assign]
        metrics.attach("tiny", engine)
    return metrics


def make_record(**changes: Any) -> RequestRecord:
    values = {
        "queue_s": 0.1, "prefill_s": 0.2, "first_token_s": 0.3, "decode_s": 0.9, "total_s": 1.2, "prompt_tokens": 20,
        "cached_tokens": 16, "generated_tokens": 10, "end": "stop", "preemptions": 0, "cached": False,
    }  # fmt: skip
    return RequestRecord(**values | changes)


def samples(metrics: Metrics) -> dict[str, float]:
    """The samples of the model's metrics, `name{label=value,…}` without the labels that all have."""
    result = {}
    for family in text_string_to_metric_families(metrics.exposition().decode()):
        for sample in family.samples:
            labels = {name: value for name, value in sample.labels.items() if name not in ("model_name", "engine")}
            text = ",".join(f"{name}={value}" for name, value in sorted(labels.items()))
            result[sample.name.removeprefix(PREFIX) + (f"{{{text}}}" if text else "")] = sample.value
    return result


def test_the_engines_counts_are_shown() -> None:
    found = samples(make_metrics())
    expected = {
        "num_requests_running": 3, "num_requests_waiting": 2, "kv_cache_usage_perc": 0.25, "kv_cache_cached_perc": 0.5,
        "prefix_cache_queries_total": 400, "prefix_cache_hits_total": 100, "num_preemptions_total": 5,
        "prompt_tokens_total": 1000, "generation_tokens_total": 2000, "cancellations_total": 4, "steps_total": 50,
        "request_success_total{finished_reason=stop}": 7, "request_success_total{finished_reason=abort}": 4,
        "request_success_total{finished_reason=error}": 0, "result_cache_hits_total": 11,
        "result_cache_lookups_total": 24, "result_cache_audits_total": 2, "result_cache_audit_differences_total": 1,
        "result_cache_bytes": 512, f"cache_config_info{{block_size={BLOCK_SIZE},num_blocks=16}}": 1,
    }  # fmt: skip
    assert {name: found.get(name) for name in expected} == expected
    (build,) = (name for name in found if name.startswith("build_info"))
    assert f"version={__version__}" in build and "kernels=kernels-avx2" in build


def test_adapters_are_shown_as_vllm_shows_them() -> None:
    metrics = Metrics()
    with make_engine() as engine:
        of_adapters = AdapterStats(4, ("law", "tax"), ("tax",))
        engine.stats = lambda: replace(STATS, adapters=of_adapters)  # type: ignore[method-assign]
        engine.adapters = SimpleNamespace(names=lambda digests: ("law", "other") if "d" in digests else ())  # type: ignore[assignment]
        metrics.attach("tiny", engine)
    for record in (make_record(adapter="d"), make_record(adapter="d", end="length"), make_record()):
        metrics.ended(record)
    found = samples(metrics)
    facts = "max_lora=4,running_lora_adapters=law,tax,waiting_lora_adapters=tax"
    assert found[f"lora_requests_info{{{facts}}}"] == pytest.approx(time.time(), abs=600)
    assert found["lora_request_success_total{finished_reason=stop,lora_name=law}"] == 1
    assert found["lora_request_success_total{finished_reason=length,lora_name=law}"] == 1
    assert found["lora_generation_tokens_total{lora_name=law}"] == 20 and found["request_generation_tokens_sum"] == 30
    assert not any(name.startswith("lora_") for name in samples(make_metrics())), "an engine without adapters has none"


def test_adapters_of_two_engines_are_shown_together() -> None:
    old, new = AdapterStats(2, ("law", "tax"), ()), AdapterStats(4, ("tax",), ("art",))
    both = combine(replace(STATS, adapters=old), replace(STATS, adapters=new)).adapters
    assert both == AdapterStats(4, ("law", "tax"), ("art",))
    assert combine(STATS, replace(STATS, adapters=new)).adapters == new == combine(replace(STATS, adapters=new), STATS).adapters


def test_all_samples_of_the_engine_name_the_model() -> None:
    for family in text_string_to_metric_families(make_metrics().exposition().decode()):
        if family.name.startswith(PREFIX) and not family.name.startswith(f"{PREFIX}http_"):
            assert {sample.labels["model_name"] for sample in family.samples} == {"tiny"}


def test_steps_are_observed() -> None:
    metrics = make_metrics()
    metrics.step(StepRecord(0.06, 40, 30, 3, 3, 2, [0.02, 0.05, 0.3]))
    metrics.step(StepRecord(0.01, 8, 8, 0, 3, 2, []))
    found = samples(metrics)
    assert found["iteration_tokens_total_count"] == 2 and found["iteration_tokens_total_sum"] == 48
    assert found["iteration_tokens_total_bucket{le=8.0}"] == 1 and found["iteration_tokens_total_bucket{le=64.0}"] == 2
    assert found["inter_token_latency_seconds_count"] == 3
    assert found["inter_token_latency_seconds_bucket{le=0.05}"] == 2, "a bucket's bound belongs to it"
    assert found["step_time_seconds_sum"] == pytest.approx(0.07)


def test_requests_are_observed() -> None:
    metrics = make_metrics()
    metrics.ended(make_record())
    metrics.asked(3, 64)
    metrics.asked(1, None)
    found = samples(metrics)
    sums = {
        "time_to_first_token_seconds": 0.3, "e2e_request_latency_seconds": 1.2, "request_queue_time_seconds": 0.1,
        "request_prefill_time_seconds": 0.2, "request_decode_time_seconds": 0.9, "request_inference_time_seconds": 1.1,
        "request_time_per_output_token_seconds": 0.1, "request_prompt_tokens": 20, "request_generation_tokens": 10,
        "request_params_n": 4, "request_params_max_tokens": 64,
    }  # fmt: skip
    assert {name: found[f"{name}_sum"] for name in sums} == pytest.approx(sums)


def test_what_did_not_happen_is_not_observed() -> None:
    metrics = make_metrics()
    nothing = {name: 0.0 for name in ("queue_s", "prefill_s", "first_token_s", "decode_s")}
    metrics.ended(make_record(generated_tokens=0, end="cancelled", **nothing))
    found = samples(metrics)
    assert found["e2e_request_latency_seconds_count"] == found["request_prompt_tokens_count"] == 1
    for name in ("request_queue_time", "request_prefill_time", "time_to_first_token", "request_time_per_output_token"):
        assert found[f"{name}_seconds_count"] == 0


def test_medians_are_of_the_last_requests() -> None:
    metrics = Metrics()
    assert metrics.medians().total_s is metrics.medians().first_token_s is metrics.medians().token_s is None
    for total in (1.0, 2.0, 9.0):
        metrics.ended(make_record(total_s=total))
    medians = metrics.medians()
    assert (medians.total_s, medians.first_token_s) == (2.0, 0.3) and medians.token_s == pytest.approx(0.1)
    for _ in range(256):
        metrics.ended(make_record(total_s=5.0))
    assert metrics.medians().total_s == 5.0


def test_http_requests_and_connections_are_counted() -> None:
    metrics = make_metrics()
    metrics.responded("POST", "/v1/completions", 200, 0.3)
    metrics.responded("BREW", "none", 405, 0.1)
    metrics.refused_connection()
    metrics.connections = 7
    found = samples(metrics)
    assert found["http_requests_total{handler=/v1/completions,method=POST,status=200}"] == 1
    assert found["http_requests_total{handler=none,method=other,status=405}"] == 1 and "BREW" not in METHODS
    assert found["http_request_duration_seconds_sum{handler=/v1/completions,method=POST}"] == 0.3
    assert found["http_connections_refused_total"] == 1 and found["http_connections"] == 7


def test_registries_are_apart_and_work_without_an_engine() -> None:
    first, second = Metrics(), Metrics()
    first.refused_connection()
    assert samples(first)["http_connections_refused_total"] == 1
    assert samples(second)["http_connections_refused_total"] == 0
    assert "num_requests_running" not in samples(second)


def test_histograms_count_as_numpy_does() -> None:
    bounds = (0.1, 1.0, 5.0)
    values = np.random.default_rng(0).choice([0.05, 0.1, 0.7, 1.0, 4.9, 5.0, 6.0], 500)
    histogram = Histogram(bounds)
    threads = [threading.Thread(target=histogram.observe, args=(part.tolist(),)) for part in np.split(values, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    pairs, total = histogram.cumulative()
    assert [name for name, _ in pairs] == ["0.1", "1.0", "5.0", "+Inf"]
    assert [count for _, count in pairs] == [int(np.sum(values <= bound)) for bound in (*bounds, math.inf)]
    assert total == pytest.approx(values.sum())


def test_bounds_in_steps_of_one_two_five() -> None:
    assert one_two_five(100) == (1, 2, 5, 10, 20, 50, 100) and one_two_five(7) == (1, 2, 5)
