"""What executors require of a host and of a manifest."""

from __future__ import annotations

import pytest

from belle_compile.runtime import EngineError, host
from belle_compile.runtime.artifact import Requirements, TargetInfo
from belle_compile.runtime.executors import executor_of
from tests.runtime.fakes import manifest


def need(isa: str, memory: int = 0, arch: str = "x86_64", backend: str = "tvm", mapped: int = 0) -> TargetInfo:
    return TargetInfo("cpu", backend, (isa,), Requirements(arch, (isa,), memory, mapped))


def check(target: TargetInfo, ranks_here: int = 1) -> None:
    executor_of(manifest(target=target)).check_host(target, ranks_here)


@pytest.mark.parametrize(
    ("backend", "isa", "known"),
    [
        ("tvm", "neon", "amx, avx512vnni, avx2"),
        ("tvm", "sm_80", "amx, avx512vnni, avx2"),
        ("triton", "avx2", "sm_80, sm_86, sm_89, sm_90"),
    ],
)
def test_unknown_isa_is_refused(backend: str, isa: str, known: str) -> None:
    message = rf"field target\.isas does not fit: found {isa}, expected among {known}; rebuild the engine"
    with pytest.raises(EngineError, match=message):
        executor_of(manifest(target=need(isa, backend=backend)))


def test_host_lacks_the_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "cpu_flags", lambda: frozenset({"avx2", "fma", "f16c"}))
    check(need("avx2"))
    with pytest.raises(EngineError, match=r"found instruction sets avx2 \(avx512vnni lacks avx512_vnni, .*expected one of avx"):
        check(need("avx512vnni"))
    monkeypatch.setattr(host, "cpu_flags", lambda: frozenset())
    with pytest.raises(EngineError, match=r"found instruction sets none known \(avx2 lacks avx2, f16c, fma\)"):
        check(need("avx2"))


@pytest.mark.parametrize(("backend", "isa"), [("tvm", "avx2"), ("triton", "sm_80")])
def test_host_of_another_architecture(backend: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "host_arch", lambda: ("Linux", "aarch64"))
    with pytest.raises(EngineError, match="found Linux aarch64, expected Linux x86_64"):
        check(need(isa, backend=backend))


def test_host_with_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "cpu_flags", lambda: host.ISA_FLAGS["amx"])
    monkeypatch.setattr(host, "memory_bytes", lambda: 2 << 30)
    with pytest.raises(EngineError, match=r"found 2\.0 GiB of memory, expected 8\.0 GiB; run it on a larger host"):
        check(need("amx", 8 << 30))
    check(need("avx2", 1 << 30), 2)
    with pytest.raises(EngineError, match=r"found 2\.0 GiB of memory, expected 3\.0 GiB for 3 ranks; run it on a larger host"):
        check(need("avx2", 1 << 30), 3)


def test_a_host_that_is_too_small_for_mapped_weights_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The kernel can take back their pages, so that they are no reason to refuse an engine."""
    monkeypatch.setattr(host, "cpu_flags", lambda: host.ISA_FLAGS["avx2"])
    monkeypatch.setattr(host, "memory_bytes", lambda: 4 << 30)
    check(need("avx2", 4 << 30, mapped=3 << 30))
    assert not caplog.messages
    check(need("avx2", 9 << 30, mapped=8 << 30))
    (said,) = caplog.messages
    assert said.startswith("of 4.0 GiB of memory, 3.0 GiB are left to the 8.0 GiB of mapped weights: every step reads")
    with pytest.raises(
        EngineError, match=r"found 4\.0 GiB of memory, expected 6\.0 GiB for 3 ranks, and 9\.0 GiB more for mapped w"
    ):
        check(need("avx2", 5 << 30, mapped=3 << 30), 3)


def test_a_gpu_is_not_looked_at_before_it_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "memory_bytes", lambda: 1)
    monkeypatch.setattr(host, "cpu_flags", lambda: frozenset())
    check(need("sm_80", 8 << 30, arch="", backend="triton"))


def test_instruction_sets_that_this_host_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "cpu_flags", lambda: host.ISA_FLAGS["avx512vnni"])
    cpu = TargetInfo("cpu", "tvm", ("amx", "avx2", "avx512vnni"), Requirements("", ("avx2",), 0))
    assert executor_of(manifest(target=cpu)).usable_isas(cpu) == ["avx512vnni", "avx2"], "best first"
    gpu = need("sm_90", backend="triton")
    assert executor_of(manifest(target=gpu)).usable_isas(gpu) == ("sm_90",)
