"""Render the page; equal reports give equal bytes."""

from __future__ import annotations

from importlib.resources import files

import jinja2
from markupsafe import escape

from belle_compile.compiler.report import views
from belle_compile.compiler.report.data import Report
from belle_compile.runtime.artifact import GenerationDefaults

_TEMPLATE = "report.html.jinja"


def with_generation(page: str, old: GenerationDefaults, new: GenerationDefaults) -> str | None:
    """A rendered page with other generation defaults; None if it does not show the old ones once, as this version does."""
    before, after = (f">{escape(views.generation(defaults))}<" for defaults in (old, new))
    return page.replace(before, after) if page.count(before) == 1 else None


def render(report: Report) -> str:
    """Render the report as one HTML page that contains its style and plots, has no scripts and loads no other file."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    template = environment.from_string((files("belle_compile.compiler.report") / _TEMPLATE).read_text(encoding="utf-8"))
    manifest = report.manifest
    return template.render(
        manifest=manifest,
        version=manifest.toolchain.get("belle-compile", ""),
        summary=views.summary(report),
        verdict=views.verdict(manifest),
        built=views.built(report),
        effects=views.effects(report.effects),
        unmeasured=report.effects.unmeasured,
        uncalibrated=report.uncalibrated,
        accuracy=views.accuracy(manifest),
        layers=views.layers(report.layers),
        coverage=views.coverage(report.coverage),
        memory=views.memory(report.memory, str(manifest.quantization.get("kv_cache", "")), report.ranks),
    )
