"""Targets: what --target accepts, and how it refuses the rest."""

from __future__ import annotations

import pytest

from compiler import targets
from compiler.errors import CompileError
from runtime import host


def test_cpu_in_any_case_and_with_one_rank() -> None:
    assert targets.parse("cpu") is targets.CPU
    assert targets.parse(" CPU ") is targets.CPU
    assert targets.parse("cpux1") is targets.CPU


def test_the_runtime_knows_every_instruction_set_of_the_cpu_target() -> None:
    assert targets.CPU.isas == tuple(host.ISA_FLAGS), "same names, same order: best first"


@pytest.mark.parametrize(("text", "name"), [("a100x4", "NVIDIA A100"), ("h100", "NVIDIA H100"), ("V100x8", "NVIDIA V100")])
def test_known_devices_are_refused_as_not_supported_yet(text: str, name: str) -> None:
    message = rf"^target: {name} .* does not build for it yet: found '{text}', expected cpu; use --target cpu\.$"
    with pytest.raises(CompileError, match=message):
        targets.parse(text)


@pytest.mark.parametrize("text", ["gpu", "a1000", "", "x4", "a100x0", "a100x", "cpu x2", "芯片"])
def test_other_names_list_what_there_is(text: str) -> None:
    with pytest.raises(CompileError, match=r"^target: unknown target: found .*, expected cpu; see `belle-compile targets`\.$"):
        targets.parse(text)


def test_some_of_the_instruction_sets() -> None:
    assert targets.CPU.carrying(()) == targets.CPU
    assert targets.CPU.carrying(("avx2", "amx")).isas == ("amx", "avx2"), "best first, whatever the order asked for"
    with pytest.raises(CompileError, match=r"^target: instruction set of cpu: found sse4, expected amx, avx512vnni, avx2\.$"):
        targets.CPU.carrying(("avx2", "sse4"))


def test_cpu_for_several_ranks() -> None:
    two = targets.parse("CPUx2")
    assert (two.name, two.ranks, two.isas) == ("cpux2", 2, targets.CPU.isas)
    assert two.carrying(("avx2",)).ranks == 2
    with pytest.raises(CompileError, match=r"^target: ranks of cpu: found 9, expected at most 8\.$"):
        targets.parse("cpux9")
