"""What is read from /proc and /sys."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from belle_compile.runtime import cgroups, host


def flags_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nmodel name\t: x\nflags\t\t: {flags}\n\nprocessor\t: 1\nflags\t: fpu\n")
    monkeypatch.setattr(host, "CPUINFO", tmp_path / "cpuinfo")


AVX2 = "fpu avx2 fma f16c"
VNNI = f"{AVX2} avx512f avx512bw avx512vl avx512dq avx512_vnni"


@pytest.mark.parametrize(
    ("flags", "isas"),
    [
        ("fpu sse2", ()),
        ("avx2 fma", ()),
        (AVX2, ("avx2",)),
        (f"{VNNI} amx_tile", ("avx512vnni", "avx2")),
        (f"{VNNI} amx_tile amx_int8", ("avx512vnni", "avx2")),
        (f"{VNNI} amx_tile amx_int8 amx_bf16 avx512_bf16", ("amx", "avx512vnni", "avx2")),
        (f"{AVX2} amx_tile amx_int8 amx_bf16", ("avx2",)),
    ],
)
def test_isas_best_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, isas: tuple[str, ...]) -> None:
    flags_file(tmp_path, monkeypatch, flags)
    assert host.host_isas() == isas


@pytest.mark.parametrize(
    ("vendor", "family", "model", "name"),
    [
        ("AuthenticAMD", "25", "17", "znver4"),
        ("AuthenticAMD", "25", "1", ""),
        ("AuthenticAMD", "26", "2", "znver5"),
        ("GenuineIntel", "6", "143", "sapphirerapids"),
        ("GenuineIntel", "26", "2", ""),
        ("AuthenticAMD", "?", "2", ""),
    ],
)
def test_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vendor: str, family: str, model: str, name: str) -> None:
    first = f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: {model}\nmodel name\t: EPYC 7: 8\n"
    (tmp_path / "cpuinfo").write_text(first + "\nprocessor\t: 1\nvendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel\t\t: 2\n")
    monkeypatch.setattr(host, "CPUINFO", tmp_path / "cpuinfo")
    assert host.processor() == name


def test_no_cpuinfo_names_no_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "CPUINFO", tmp_path / "none")
    assert host.processor() == ""


def test_missing_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags_file(tmp_path, monkeypatch, VNNI)
    assert host.missing_flags("amx") == ["amx_bf16", "amx_int8", "amx_tile", "avx512_bf16"]


def test_no_cpuinfo_is_no_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "CPUINFO", tmp_path / "none")
    assert host.cpu_flags() == frozenset()


def test_container_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 8, 9})
    for processors, cores in ((None, [3, 5, 8, 9]), (1.5, [3, 5]), (0.1, [3]), (4.0, [3, 5, 8, 9]), (64.0, [3, 5, 8, 9])):
        monkeypatch.setattr(cgroups, "processors", lambda limit=processors: limit)
        assert host.usable_cores() == cores
    monkeypatch.setattr(cgroups, "memory_bytes", lambda: None)
    whole = host.memory_bytes()
    for limit, memory in ((1 << 20, 1 << 20), (1 << 60, whole)):
        monkeypatch.setattr(cgroups, "memory_bytes", lambda limit=limit: limit)
        assert host.memory_bytes() == memory
