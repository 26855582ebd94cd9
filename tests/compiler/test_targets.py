"""Targets: what --target accepts, and how it refuses the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from belle_compile.compiler import targets
from belle_compile.compiler.devices import DEVICES
from belle_compile.compiler.errors import CompileError
from belle_compile.runtime import host


def test_cpu_in_any_case_and_with_one_rank() -> None:
    assert targets.parse("cpu") == targets.parse(" CPU ") == targets.parse("cpux1") == CPU
    assert (CPU.name, CPU.ranks, CPU.device) == ("cpu", 1, DEVICES["cpu"])


def test_the_runtime_knows_every_instruction_set_of_the_cpu_target() -> None:
    assert CPU.isas == tuple(host.ISA_FLAGS), "same names, same order: best first"


CPU = targets.parse("cpu")
BUILT = "cpu, arm64, a100-40g, a100-80g, h100, h200, l40s, rtx3090, rtx4090, rtx5090, t4"


@pytest.mark.parametrize(("text", "name"), [("a30", "NVIDIA A30"), ("V100x8", "NVIDIA V100")])
def test_known_devices_are_refused_as_not_supported_yet(text: str, name: str) -> None:
    message = rf"^target: {name} .* does not build for it yet: found '{text}', expected {BUILT}; use --target {BUILT}\.$"
    with pytest.raises(CompileError, match=message):
        targets.parse(text)


@pytest.mark.parametrize("text", ["gpu", "a1000", "", "x4", "a100x0", "a100x", "cpu x2", "芯片"])
def test_other_names_list_what_there_is(text: str) -> None:
    with pytest.raises(
        CompileError, match=rf"^target: unknown target: found .*, expected {BUILT}; see `belle-compile targets`\.$"
    ):
        targets.parse(text)


def test_gpus_by_their_architecture() -> None:
    found = {name: targets.parse(name) for name in ("a100x1", "A100x4", "h100x2", "l40s", "rtx4090")}
    assert [target.isas for target in found.values()] == [("sm_80",), ("sm_80",), ("sm_90",), ("sm_89",), ("sm_89",)]
    assert [(target.name, target.ranks) for target in found.values()] == [
        ("a100-40g", 1), ("a100-40gx4", 4), ("h100x2", 2), ("l40s", 1), ("rtx4090", 1),
    ]  # fmt: skip
    assert not any(target.device.arch for target in found.values()), "their hosts may be of any kind"


def test_some_of_the_instruction_sets() -> None:
    assert CPU.carrying(()) == CPU
    assert CPU.carrying(("avx2", "amx")).isas == ("amx", "avx2"), "best first, whatever the order asked for"
    with pytest.raises(CompileError, match=r"^target: instruction set of cpu: found sse4, expected amx, avx512vnni, avx2\.$"):
        CPU.carrying(("avx2", "sse4"))


def test_cpu_for_several_ranks() -> None:
    two = targets.parse("CPUx2")
    assert (two.name, two.ranks, two.isas) == ("cpux2", 2, CPU.isas)
    assert two.carrying(("avx2",)).ranks == 2
    with pytest.raises(CompileError, match=r"^target: ranks of cpu: found 9, expected 1 to 8\.$"):
        targets.parse("cpux9")


def test_devices_are_described() -> None:
    assert all(
        device.memory and device.memory_bandwidth and device.link_latency for device in DEVICES.values() if not device.arch
    )
    assert targets.known_as("a100") == "NVIDIA A100 40 GB, SXM (sm_80)"
    assert CPU.device.memory == 0, "that of the host"


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    text = 'device = "cpu"\nranks = 2\nmemory_gib = 1.5\nisas = ["avx2"]\nlink_latency_us = 20\nmax_ranks = 16\n'
    target = targets.parse(write(tmp_path / "server.toml", text))
    assert (target.name, target.ranks, target.isas) == ("cpux2", 2, ("avx2",))
    assert (target.device.memory, target.device.link_latency, target.device.max_ranks) == (3 << 29, 2e-5, 16)
    assert targets.parse(write(tmp_path / "plain.toml", 'device = "CPU"')) == CPU


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"key device of .*server\.toml: found nothing, expected a string; see `belle-compile targets`"),
        ('device = "cpu"\nspeed = 3', r"key speed of .*: found an unknown field, expected one of device, ranks"),
        ('device = "cpu"\nranks = "two"', r'key ranks of .*: found "two", expected an integer'),
        ('device = "cpu"\nmemory_gib = -1', r"key memory_gib of .*: found -1, expected a number above 0"),
        ('device = "cpu"\nranks = 20', r"ranks of cpu: found 20, expected 1 to 8"),
        ('device = "cpu"\nisas = ["neon"]', r"instruction set of cpu: found neon"),
        ('device = "a30"\nranks = 2', r"NVIDIA A30 .* does not build for it yet: found 'a30'"),
        ('device = "abacus"', r"unknown target: found 'abacus'"),
        ("device =", r"file .*server\.toml: found .*, expected a TOML file"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(CompileError, match=f"^target: {message}"):
        targets.parse(write(tmp_path / "server.toml", text))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        CompileError, match=r"^target: file .*none\.toml: found No such file or directory, expected a TOML file"
    ):
        targets.parse(str(tmp_path / "none.toml"))
