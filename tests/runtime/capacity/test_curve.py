"""Limits of latency that follow from a curve, and files of curves that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from belle_compile.runtime.artifact import read_manifest
from belle_compile.runtime.capacity.curve import (
    CAPACITY_NAME,
    Latency,
    check_capacity,
    describe_host,
    read_capacity,
    write_capacity,
)
from belle_compile.runtime.capacity.slo import Slo, limited
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.serving.scheduling import FirstTokenLimit, SchedulerOptions
from tests.runtime.capacity.curves import curve, level
from tests.runtime.fakes import make_directory


@pytest.mark.parametrize(
    ("token_s", "sequences"), [(0.01, 1), (0.0199, 3), (0.02, 4), (0.03, 6), (0.0399, 7), (0.04, 8), (0.07, 12), (9.0, 16)]
)
def test_as_many_answers_as_keep_the_time_between_tokens(token_s: float, sequences: int) -> None:
    assert curve().most_sequences(token_s) == sequences


def test_a_level_that_misses_ends_the_curve() -> None:
    bent = curve(level(1, 10), level(2, 50), level(4, 20))
    assert bent.most_sequences(0.02) == 1


def test_what_one_user_misses_is_refused() -> None:
    message = "slo-tpot cannot be kept on this host: found 10.0 ms a token with 1 user, expected at most 9; raise it."
    with pytest.raises(EngineError, match=message):
        curve().most_sequences(0.009)
    with pytest.raises(EngineError, match=r"slo-ttft cannot be kept on this host: found 0.10 s to the first token with 1 user"):
        curve().first_token_limit(0.05, 4)


def test_the_pace_of_the_nearest_level_is_expected() -> None:
    limit = curve().first_token_limit(0.8, 7)
    assert limit == FirstTokenLimit(0.8, 1000.0, 64 * 40 / 8 / 1e3)


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_capacity(curve(), tmp_path / "c.json")
    assert read_capacity(tmp_path / "c.json") == curve() and [path.name for path in tmp_path.iterdir()] == ["c.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"levels": []}, "field levels does not fit: found users of no level"),
        ({"levels": "x"}, "field levels does not fit: found"),
        ({"format_version": 2}, "field format_version does not fit: found 2, expected 1; measure it with belle-run benchmark."),
        ({"prompt_tokens_per_s": 0.0}, "field requests_per_s does not fit: found 0.0, expected rates above 0"),
        ({"more": 1}, "more"),
    ],
)
def test_files_that_do_not_fit_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps(json.loads(curve().to_text()) | change))
    with pytest.raises(EngineError, match=message):
        read_capacity(path)


def test_levels_are_in_order(tmp_path: Path) -> None:
    write_capacity(curve(level(4, 20), level(2, 10)), tmp_path / "c.json")
    with pytest.raises(EngineError, match=r"found users 4, 2, expected at least one, each with more users"):
        read_capacity(tmp_path / "c.json")


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"No such file or directory; measure it with belle-run benchmark."):
        read_capacity(tmp_path / "none.json")
    (tmp_path / "c.json").write_text("{")
    with pytest.raises(EngineError, match=r"is no JSON"):
        read_capacity(tmp_path / "c.json")
    with pytest.raises(EngineError, match=r"cannot be written: found No such file or directory; give another place"):
        write_capacity(curve(), tmp_path / "none" / "c.json")


def test_a_curve_counts_for_its_engine_its_host_and_its_threads() -> None:
    path, measured = Path("c.json"), curve(threads=2)
    check_capacity(measured, path, "0" * 64, 2)
    with pytest.raises(EngineError, match=r"was measured for another engine: found 000000000000…, expected 111111111111…"):
        check_capacity(measured, path, "1" * 64, 2)
    with pytest.raises(EngineError, match=r"another number of threads: found 2, expected 1; measure it"):
        check_capacity(measured, path, "0" * 64, 1)
    with pytest.raises(EngineError, match=r"another host: found a toaster, 1 cores, expected"):
        check_capacity(curve(host="a toaster, 1 cores"), path, "0" * 64, 2)


def test_limits_become_options_of_the_scheduler(tmp_path: Path) -> None:
    directory = make_directory(tmp_path / "engine", {"tokenizer.json": b"{}"})
    write_capacity(curve(engine=read_manifest(directory).digest), directory / CAPACITY_NAME)
    options = SchedulerOptions(max_queue=5)
    assert limited(options, None, directory, None) is options
    both = limited(options, Slo(0.9, 0.02), directory, None)
    assert (both.max_num_seqs, both.max_queue) == (4, 5) and both.first_token == FirstTokenLimit(0.9, 1000.0, 0.32)
    assert limited(SchedulerOptions(max_num_seqs=3), Slo(token_s=0.02), directory, None) == SchedulerOptions(max_num_seqs=3)
    only = limited(options, Slo(first_token_s=0.9), directory, None)
    assert only.max_num_seqs is None and only.first_token == FirstTokenLimit(0.9, 1000.0, 0.4)
    with pytest.raises(EngineError, match=r"other.json cannot be read"):
        limited(options, Slo(0.9, capacity=tmp_path / "other.json"), directory, None)


def test_the_host_has_a_name() -> None:
    assert "cores" in describe_host() and Latency(1, 2).p99 == 2
