"""The passes of every preset, as a build for one rank without requests runs them."""

from __future__ import annotations

from collections.abc import Mapping

from belle_compile.passes.base import Pass, Phase
from belle_compile.passes.pipeline import passes_of
from belle_compile.passes.presets import PRESETS

PIPELINES: Mapping[str, tuple[Pass, ...]] = {name: passes_of(preset.recipe) for name, preset in PRESETS.items()}
CLEANUP = tuple(step for step in PIPELINES["none"] if step.phase is Phase.CLEANUP)
