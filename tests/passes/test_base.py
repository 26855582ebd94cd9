"""What all passes have in common."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import pytest

from belle_compile import passes
from belle_compile.passes.base import Pass, Phase
from tests.pipelines import PIPELINES


def test_every_pass_declares_its_phase() -> None:
    modules = [importlib.import_module(found.name) for found in pkgutil.walk_packages(passes.__path__, f"{passes.__name__}.")]
    concrete = {
        one
        for module in modules
        for one in vars(module).values()
        if inspect.isclass(one) and issubclass(one, Pass) and not inspect.isabstract(one)
    }
    assert len(concrete) >= 20
    assert {one.__name__ for one in concrete if not isinstance(getattr(one, "phase", None), Phase)} == set()


@pytest.mark.parametrize("preset", PIPELINES)
def test_a_preset_runs_one_phase_after_the_other(preset: str) -> None:
    phases = [step.phase for step in PIPELINES[preset]]
    assert phases == sorted(phases)
