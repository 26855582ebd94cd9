"""The plan's lines, and the command that shows them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from belle_compile.compiler.cli import cli
from belle_compile.compiler.devices import DEVICES
from belle_compile.compiler.plan import rates
from belle_compile.compiler.plan.table import Load, plan
from belle_compile.runtime.capacity.curve import write_capacity
from tests.compiler.plan.test_work import BELLE_7B, EXT_7B, written
from tests.runtime.capacity.curves import curve

SMALL = EXT_7B | {"hidden_size": 96, "intermediate_size": 576, "num_attention_heads": 6, "num_key_value_heads": 6}


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that reads 40 GB/s and has four cores with AVX512-VNNI."""
    monkeypatch.setattr(rates, "read_bandwidth", lambda threads: 40e9)
    monkeypatch.setattr(rates.host, "usable_cores", lambda: [0, 1, 2, 3])
    monkeypatch.setattr(rates.host, "host_isas", lambda: ("avx512vnni", "avx2"))


def lines(found: dict[str, Any]) -> dict[int, dict[str, Any]]:
    return {line["ranks"]: line for line in found["plan"]}


def test_belle_7b_on_a100s(tmp_path: Path) -> None:
    found = plan(written(BELLE_7B, tmp_path), "a100x4", "int8", Load(1, 512))
    by_ranks = lines(found)
    assert list(by_ranks) == [1, 2, 4, 8] and all(line["fits"] for line in by_ranks.values())
    assert "measured on an H200" in found["rates"]
    one, four = by_ranks[1], by_ranks[4]
    # 7.4 GB of weights are read (of 8.1 one table is of the embedding), and half a GB of keys and values a 2,048 tokens
    read = 7.12e9 + one["kv_bytes"]
    assert one["memory_s"] == pytest.approx(read / (0.93 * 1555e9), rel=0.03) and one["sums_s"] == 0
    assert four["memory_s"] == pytest.approx(one["memory_s"] / 4, rel=0.01) and four["sums_s"] > 0
    assert four["weight_bytes"] == pytest.approx(one["weight_bytes"] / 4, rel=0.002)
    assert one["token_s"] > four["token_s"] and one["first_token_s"] > one["token_s"]


def test_ranks_on_one_host_share_its_memory_and_cores(tmp_path: Path) -> None:
    found = plan(written(SMALL, tmp_path), "cpux3", "int8", Load(4, 64))
    by_ranks = lines(found)
    assert list(by_ranks) == [1, 2, 3, 4, 8]
    assert "4 cores of this host" in found["rates"] and "40 GB/s" in found["rates"] and by_ranks[1]["fits"] is None
    assert by_ranks[2]["memory_s"] == pytest.approx(by_ranks[1]["memory_s"], rel=0.15)
    assert "ranks" in by_ranks[8]["refused"] and "token_s" not in by_ranks[8]


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    found = plan(written(BELLE_7B, tmp_path), "rtx4090", "none", Load(1, 2048))
    assert [line["fits"] for line in found["plan"]] == [False, True, True, True]
    assert found["plan"][0]["needed_bytes"] > DEVICES["rtx4090"].memory


def test_a_file_describes_another_device(tmp_path: Path) -> None:
    target = tmp_path / "ours.toml"
    target.write_text('device = "l40s"\nranks = 2\nmemory_bandwidth_gb = 432.0\nint8_tops = 100.0\n')
    path = written(EXT_7B, tmp_path)
    ours, theirs = (lines(plan(path, name, "int8", Load(1, 16)))[2] for name in (str(target), "l40s"))
    assert ours["memory_s"] == pytest.approx(2 * theirs["memory_s"], rel=0.01)


def test_the_command_shows_a_table_or_json(tmp_path: Path) -> None:
    path = written(SMALL, tmp_path)
    shown = CliRunner().invoke(cli, ["plan", str(path), "--target", "h100", "--batch", "4", "--context", "100"])
    assert shown.exit_code == 0, shown.output
    head, about, _, names, *rows = shown.output.splitlines()
    assert "NVIDIA H100" in head and "batch 4, context 100 tokens" in about
    assert names.split()[:4] == ["ranks", "weights", "KV", "cache"] and [row.split()[0] for row in rows] == ["1", "2", "4", "8"]
    assert rows[-1].startswith("8 ranks: partition: key/value heads for 8 ranks: found 6 of 1 query heads each")
    as_json = CliRunner().invoke(cli, ["plan", str(path), "--target", "h100", "--json"])
    assert json.loads(as_json.output)["plan"][0]["ranks"] == 1


def test_what_was_measured_is_shown_beside_the_prediction(tmp_path: Path) -> None:
    path, measured = written(SMALL, tmp_path), tmp_path / "capacity.json"
    write_capacity(curve(), measured)
    found = plan(path, "cpu", "int8", Load(1, 16, curve()))["measured"]
    assert [(level["users"], level["token_s"]) for level in found["levels"]] == [(1, 0.008), (4, 0.016), (8, 0.032), (16, 0.08)]
    alike = lines(plan(path, "cpu", "int8", Load(8, 128 + 32)))[1]["token_s"]
    assert found["levels"][2]["predicted_token_s"] == alike and found["date"] == "2026-11-30"
    shown = CliRunner().invoke(cli, ["plan", str(path), "--target", "cpu", "--measured", str(measured)])
    *_, names, one, _, _, _ = shown.output.rstrip().splitlines()
    assert names.split() == ["users", "predicted", "ms", "a", "token", "measured", "tokens/s"]
    assert one.split()[::2] == ["1", "8.00"]
    refused = CliRunner().invoke(cli, ["plan", str(path), "--target", "cpu", "--measured", str(tmp_path / "none.json")])
    assert refused.exit_code == 1 and "measure it with belle-run benchmark" in str(refused.exception)


def test_methods_that_a_backend_needs(tmp_path: Path) -> None:
    path = str(written(SMALL, tmp_path))
    command = ["plan", path, "--target", "rtx4090", "--backend", "tensorrt", "--json"]
    without = json.loads(CliRunner().invoke(cli, command).output)["plan"][0]
    assert "add static to --methods" in without["refused"]
    planned = json.loads(CliRunner().invoke(cli, [*command, "--methods", "rotate,static"]).output)
    assert planned["methods"] == ["rotate", "static"] and planned["plan"][0]["needed_bytes"] > 0
    wrong = CliRunner().invoke(cli, [*command, "--methods", "statik"])
    assert wrong.exit_code == 1 and "unknown method: found statik" in str(wrong.exception)


@pytest.mark.parametrize(("target", "message"), [("a10", "NVIDIA A10"), ("tpu", "unknown target")])
def test_unknown_devices(target: str, message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["plan", str(written(SMALL, tmp_path)), "--target", target])
    assert result.exit_code and message in str(result.exception)
