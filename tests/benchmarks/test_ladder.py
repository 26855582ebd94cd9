"""The ladder: queues and batches with given times, samples, tables, and every way on a tiny model; no figure is asserted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tvm")  # the build extra, which the benchmarks need
pytest.importorskip("tomllib")  # Python 3.11, which the comparisons of servers need

from belle_compile.compiler.driver import BuildRequest, build
from belle_compile.runtime import Engine
from belle_compile.runtime.artifact import read_manifest
from belle_compile.runtime.profiling import KernelTime
from benchmarks.ladder import claims, report
from benchmarks.ladder.load import REPLAYED, Answer, Sample, Served, batched, replay
from benchmarks.ladder.steps import BATCHING, ENGINES, STEPS, Asked, read_requests, write_requests
from benchmarks.ladder.ways import WAYS
from benchmarks.ladder.workers import StepError, Worker
from benchmarks.serving.workloads import Chat, Question
from tests.parity.engines import BEST_ISA

BLOOM = Path(__file__).parents[1] / "fixtures" / "tiny-bloom-trained"


# Queues


def test_who_waits_sees_the_times_of_all_before() -> None:
    sample = replay([Served([0.5], 1.0, 0.75), Served([1.0], 3.0, 2.25)], [5, 5], users=4)
    steady = sample.answers[4:]
    assert len(sample.answers) == REPLAYED * 4
    assert all(answer.latency_s == pytest.approx(8.0) for answer in steady)  # four requests of 1, 3, 1 and 3 s
    assert {round(answer.first_token_s, 3) for answer in steady} == {8 - 1 + 0.5, 8 - 3 + 1.0}
    plain = sample.to_plain()
    assert plain["requests_per_second"] == pytest.approx(0.5) and plain["busy"] == 0.75 and plain["good"] == 0.0
    assert replay([Served([0.5], 1.0)], [5], users=1).busy is None


def test_batches_are_sorted_by_length_and_end_together() -> None:
    seen: list[list[int]] = []

    def serve(batch: Sequence[Asked]) -> Served:
        seen.append([len(asked.prompt) for asked in batch])
        return Served([0.25] * len(batch), 1.0)

    requests = [Asked([1] * length, 4) for length in (9, 2, 7, 3, 5, 1)]
    sample = batched(requests, users=4, seconds=10, largest=2, serve=serve)
    assert seen == [[2, 3], [7, 9], [1, 5]]
    assert [answer.end for answer in sample.answers] == [1, 1, 2, 2, 3, 3]
    assert [answer.first for answer in sample.answers] == [0.25, 0.25, 1.25, 1.25, 2.25, 2.25]
    assert [answer.sent for answer in sample.answers] == [0, 0, 0, 0, 1, 1]
    assert len(batched(requests, users=2, seconds=0.5, largest=2, serve=serve).answers) == 2


def test_a_sample_counts_what_ended_in_time_and_leaves_out_the_first_answers() -> None:
    answers = [Answer(0, 3, 5, 3), Answer(0, 0.5, 0.54, 3), Answer(1, 1.5, 1.56, 3), Answer(9, 9.5, 11, 31)]
    plain = Sample(2, answers, 10.0).to_plain()
    assert plain["requests_per_second"] == pytest.approx(1 / (5 - 1.56), abs=1e-4)  # from the second end to the third
    assert plain["tokens_per_second"] == pytest.approx(3 / (5 - 1.56), abs=1e-3) and plain["busy"] is None
    assert plain["answers"] == 4 and plain["first_token_p99"] < 3000  # the third and fourth to end count
    assert [answer.good for answer in answers] == [False, True, True, True]
    assert Sample(8, answers, 10.0).to_plain()["latency_p50"] > 0


# Steps


def test_each_step_has_one_thing_more_than_the_one_before() -> None:
    assert {step.way for step in STEPS} == set(WAYS) and {step.engine for step in STEPS} <= {"", *ENGINES}
    assert [step.name for step in STEPS][:2] == ["recompute", "kv-cache"] and STEPS[-1].ranks == 2
    for before, step in pairwise(STEPS):
        names = ("way", "engine", "kv_cache", "prefix_cache", "result_cache")
        assert sum(getattr(before, name) != getattr(step, name) for name in names) == 1 + (step.name == "compiled")


def test_attention_that_a_kv_cache_saves() -> None:
    assert claims.attention_pairs(100) == (5050, 100)


def test_kernels_are_summed_up_by_group() -> None:
    def kernel(kind: str, calls: int, seconds: float) -> KernelTime:
        return KernelTime(kind, "T", calls, seconds, 0.1, 0, 0.0, None)

    found = claims.by_group(
        [kernel("norm", 4, 0.002), kernel("add", 4, 0.001), kernel("qlinear", 8, 0.01), kernel("x", 2, 0.0)], 2
    )
    assert found["norms, additions and their rounding"] == {"calls": 4.0, "ms": pytest.approx(1.5)}
    assert found["linear layers"] == {"calls": 4.0, "ms": pytest.approx(5.0)} and found[claims.OTHER]["calls"] == 1.0


# Tables


def pair(before: str, after: str, rates: Sequence[tuple[float, float]]) -> dict[str, Any]:
    def sample(rate: float) -> dict[str, Any]:
        times = {f"{name}_{p}": 1000 / rate for name in ("latency", "first_token") for p in ("p50", "p99")}
        return {"requests_per_second": rate, "tokens_per_second": 10 * rate, "busy": 0.5 if rate > 1 else None, **times}

    samples = {name: [sample(each[i]) for each in rates] for i, name in enumerate((before, after))}
    held = {name: {"users": 4, "samples": []} for name in (before, after) if name != "kv-cache" or before != "kv-cache"}
    return {"steps": [before, after], "samples": samples, "alone": samples, "held": held}


def result() -> dict[str, Any]:
    groups = {"linear layers": {which: {"calls": 5.0, "ms": 1.5} for which in ("unfused", "fused")}}
    return {
        "model": "m", "target": "cpu", "users": 16, "rounds": 3, "seconds": 5.0, "threads": 2,
        "limits": {"first_token_s": 0.8, "token_s": 0.05, "share": 0.99},
        "titles": {step.name: step.title for step in STEPS},
        "machine": {"processor": "a processor", "system": "Linux", "date": "2026-01-01"},
        "pairs": [
            pair("recompute", "kv-cache", [(1, 4), (1, 5), (1, 9)]), pair("kv-cache", "compiled", [(4, 8), (5, 10), (6, 18)]),
        ],
        "accuracy": {"requests": 64, "accuracy_kept": 0.9937, "perplexity_ratio": 1.0021, "top1_agreement": 0.97},
        "claims": {
            "kv_cache": {
                "context": 100, "pairs_kept": 100, "pairs_again": 5050, "work_saved": 0.98, "attention_kept_ms": 0.1,
                "attention_again_ms": 1.0, "time_saved": 0.9,
            },
            "int8": {"decode": {"ratio": 3.5, "float32_ms": 7.0, "int8_ms": 2.0}},
            "fusion": {"int8": {"kernel_calls": {"before": 106, "after": 55}, "groups": groups}},
            "batching": {
                "titles": {step.name: step.title for step in BATCHING},
                "samples": pair("padded-8", "continuous", [(1, 3), (2, 8), (3, 6)])["samples"],
            },
        },
    }  # fmt: skip


def test_rows_are_compared_with_the_step_measured_beside_them() -> None:
    first, second, third = report.rows(result())
    assert (first["ratio"], second["ratio"], third["ratio"]) == (None, 5, 2) and third["whole"] == 10
    assert second["requests_per_second"] == 5 and third["requests_per_second"] == 10
    assert first["busy"] is None and third["busy"] == 0.5 and third["users_held"] == 4


def test_the_ladder_replaces_its_part_of_a_page(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "results").mkdir()
    (tmp_path / "docs").mkdir()
    (tmp_path / "results" / "ladder-m.json").write_text(json.dumps(result()))
    page = tmp_path / "docs" / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    assert report.write(tmp_path / "results", page) == page
    text = page.read_text()
    assert report.write(tmp_path / "results", page).read_text() == text
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "![The ladder of m](../results/ladder-m.svg)" in text and (tmp_path / "results" / "ladder-m.svg").is_file()
    assert "| KV cache | 5.00 | 5.00 | 5.0 |" in text and "98.0% saved" in text and "106 kernel calls a step before, 55" in text
    assert "64 requests that were held out: 99.37% of the model's accuracy" in text
    assert "3.00 times the better of the padded ones" in text and "kernels busy 50% of the time" in text
    with pytest.raises(SystemExit, match=r"no .*\.json in"):
        report.write(tmp_path, page)
    with pytest.raises(SystemExit, match=r"no page .*missing\.md; --page names one"):
        report.check(tmp_path / "missing.md")
    page.write_text("nothing")
    with pytest.raises(SystemExit, match="has no place for the ladder"):
        report.write(tmp_path / "results", page)


# Every way, on a tiny model


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ladder") / "engine"
    return build(BuildRequest(str(BLOOM), out, isas=(BEST_ISA,), drift=False, fuse=False))


def test_an_engine_without_fusion_has_more_kernels(engine: Path) -> None:
    manifest = read_manifest(engine)
    fusions = [record.name for record in manifest.passes if record.name.startswith("fuse-")]
    assert fusions == ["fuse-dequantize"] and 55 < manifest.kernel_calls.after < manifest.kernel_calls.before


@pytest.fixture(scope="module")
def requests(engine: Path) -> Path:
    path = engine.parent / "requests.jsonl"
    with Engine.load(engine) as loaded:
        chats = [Chat("Be brief.", (Question(f"What is {number}" + "?" * number, 3 + number % 2),)) for number in range(12)]
        write_requests(loaded, [*chats, Chat("", (Question("far too long " * 200, 3),))], 150, 32, path)
    return path


def test_requests_are_the_same_tokens_for_all_steps(engine: Path, requests: Path) -> None:
    found = read_requests(requests)
    assert len(found) == 12 and {asked.tokens for asked in found} == {3, 4}
    with Engine.load(engine) as loaded:
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 0"}]
        assert found[0].prompt == loaded.encode(messages)
        with pytest.raises(SystemExit, match="no request has at most 3 tokens"):
            write_requests(loaded, [Chat("", (Question("What", 3),))], 3, 32, requests.with_name("none"))


@pytest.mark.parametrize(
    "step",
    [step for step in (*STEPS, BATCHING[1]) if step.way != "transformers" and step.ranks == 1],
    ids=lambda step: step.name,
)
def test_a_way_of_our_engine(step: Any, engine: Path, requests: Path) -> None:
    way = WAYS[step.way](step.settings(engine, 1))
    plain = way.sample(read_requests(requests), 3, 0.2).to_plain()
    assert plain["answers"] >= 3 and plain["requests_per_second"] > 0 and 0 < plain["busy"] <= 1.01
    way.engine.close()  # type: ignore[attr-defined]


def test_transformers_takes_as_many_forwards_as_tokens(requests: Path) -> None:
    from benchmarks.ladder.ways import Transformers

    for step in STEPS[:2]:
        way = Transformers(step.settings(BLOOM, 1))
        asked = read_requests(requests)[0]
        served = way.answer(asked)
        assert len(way.ends) == asked.tokens and 0 < served.first_token_s[0] <= served.seconds
        assert served.busy_s is not None and 0 < served.busy_s <= served.seconds


def test_a_worker_takes_samples_and_ends(engine: Path, requests: Path, tmp_path: Path) -> None:
    step = next(step for step in STEPS if step.name == "continuous")
    with Worker(step.name, step.settings(engine, 1), tmp_path / "log") as worker:
        found = worker.sample(requests, 2, 0.2)
    assert found["users"] == 2 and found["answers"] >= 2
    broken = step.settings(tmp_path / "missing", 1)
    with pytest.raises(StepError, match=r"^continuous: .*missing.*log\)$"), Worker(step.name, broken, tmp_path / "log"):
        pass
