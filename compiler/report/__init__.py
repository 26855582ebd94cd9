"""report.html, a page about a build: its input, the effects of each pass, the engine's accuracy and its memory."""

from __future__ import annotations

from belle_compile.compiler.report.coverage import coverage_of, coverage_of_set
from belle_compile.compiler.report.data import Arena, Drift, Effects, Memory, Report, Stage
from belle_compile.compiler.report.effects import PassEffects, pass_effects
from belle_compile.compiler.report.memory import memory_of, memory_of_ranks
from belle_compile.compiler.report.render import render, with_generation
from belle_compile.runtime.artifact import REPORT_NAME

__all__ = [
    "REPORT_NAME",
    "Arena",
    "Drift",
    "Effects",
    "Memory",
    "PassEffects",
    "Report",
    "Stage",
    "coverage_of",
    "coverage_of_set",
    "memory_of",
    "memory_of_ranks",
    "pass_effects",
    "render",
    "with_generation",
]
