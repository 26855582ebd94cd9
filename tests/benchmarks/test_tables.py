"""Tables and fits of made-up results; nothing is measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("tvm")  # the build extra, which the benchmarks need

from benchmarks import presets, report, scaling
from benchmarks.checkpoints import SHAPES
from benchmarks.engines import Cost
from benchmarks.tasks import Task
from tests.benchmarks.results import BANDWIDTH, FIXED_S, speed, sweep


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    contents = {
        "speed-small": speed("small", 200_000_000),
        "speed-large": speed("large", 1_000_000_000),
        "sweep-large-1": sweep("large", 1_000_000_000, 1),
        "sweep-large-2": sweep("large", 1_000_000_000, 2),
    }
    for name, result in contents.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    return tmp_path


def test_shares_of_the_limit() -> None:
    cost = Cost(weight_bytes=1000, kv_bytes_per_token=10, operations_per_token=100, operations_per_row=50, isas=())
    decode = Task("decode", 4, 32, 8).sample(2e-6, cost, limit=2.0)
    assert decode["tokens_per_second"] == 2e6
    assert decode["share"] == pytest.approx((1000 + 4 * 36.5 * 10) / 2e-6 / 2e9, abs=1e-4)
    prefill = Task("prefill", 1, 512).sample(1e-6, cost, limit=0.1)
    assert prefill["tokens_per_second"] == 512e6 and prefill["share"] == pytest.approx(51_250 / 1e-6 / 1e11, abs=1e-4)


def test_results_page(folder: Path) -> None:
    page = report.markdown(report.read_results(folder))
    assert page.index("## small") < page.index("## large")
    assert "| avx512vnni | " in page and "200 MB of weights a step, 1.5 times the last-level cache, which may lift" in page
    assert "a processor, 2 threads, 8 GiB, Linux, 2026-01-01; 3 samples" in page
    assert ", 50% | " in page and "| 0.25 | 1,234 |" in page and "Outside of kernels (avx512vnni): decode: 2.0%" in page
    assert "- decode: linear layers 19.0 GB/s in 70% of the time, attention (keys and values) 12.0 GB/s in 20%" in page


def test_no_results(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no speed-\*\.json"):
        report.read_results(tmp_path)


def test_fit_finds_the_machine(folder: Path) -> None:
    measured = scaling.points(report.read_results(folder))
    line = scaling.fit([point for point in measured if point.batch == 1])
    assert line.fixed_s == pytest.approx(FIXED_S, rel=0.01) and line.bandwidth == pytest.approx(BANDWIDTH, rel=0.01)
    assert line.worst < 0.01
    alike = scaling.fit([point for point in measured if point.batch == 1 and point.shape == "large" and point.context < 100])
    assert alike.fixed_s == 0


def test_scaling_page(folder: Path) -> None:
    measured = scaling.points(report.read_results(folder) + report.read_results(folder, "sweep-*.json"))
    line = scaling.fit([point for point in measured if point.batch == 1 and point.threads == 2])
    page = scaling.markdown(measured, line, 2)
    for title in ("## Model size and context, batch 1", "## Batch, large", "## Threads, large, batch 1", "## Larger models"):
        assert title in page
    assert "Fitted at 2 threads: 1.00 ms + bytes / 20.0 GB/s" in page and "| llama-13b | 2000 |" in page
    assert "| large | avx512vnni | 1 | 1 |" in page and "| large | avx512vnni | 2 | 16 |" in page


def test_bytes_of_known_shapes() -> None:
    # What `program.json` of engines of these shapes says.
    weights, kv = scaling.step_bytes(SHAPES["llama-1b"])
    assert weights == pytest.approx(1_038_000_000, rel=0.01) and kv == 22 * 2 * 4 * 64 * 2


def test_plots(folder: Path) -> None:
    pytest.importorskip("matplotlib")
    report.write(folder)
    first = (folder / "speed.svg").read_bytes()
    scaling.write(folder)
    report.write(folder)
    assert (folder / "speed.svg").read_bytes() == first and b"<svg" in (folder / "scaling.svg").read_bytes()
    assert "[scaling](SCALING.md)" in (folder / "README.md").read_text()


def test_a_preset_beside_the_default_is_judged_by_neighbours(folder: Path) -> None:
    samples = {"batch 1": {"int8": [1.0, 2.0, 4.0], "int8-accurate": [1.1, 2.02, 4.4]}}
    tasks = presets.summarize(samples, "int8-accurate")
    ratios = {"ratio": 1.1, "ratio_lowest": 1.01, "ratio_highest": 1.1}
    assert tasks == {"batch 1": {"int8_s": 2.0, "int8-accurate_s": 2.02} | ratios}
    about = {"shape": "large", "preset": "int8-accurate", "threads": 2, "rounds": 3, "tasks": tasks}
    (folder / "presets-large.json").write_text(json.dumps(about | {"machine": speed("large", 1)["machine"]}))
    page = report.page(folder)
    assert "## int8-accurate beside int8" in page and "1.100 [1.010, 1.100] | 3 |" in page
