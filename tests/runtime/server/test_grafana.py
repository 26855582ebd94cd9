"""The dashboard: Grafana can provision it, and it asks for nothing that /metrics does not show."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from belle_compile.runtime.server.metrics import COUNTERS, GAUGES, HISTOGRAMS, PREFIX, Metrics
from tests.runtime.fakes import make_engine

DASHBOARD = Path(__file__).parents[3] / "runtime/server/grafana.json"
METRIC = re.compile(r"\b(?:belle:|process_)\w+")


def dashboard() -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return plain


def panels() -> list[dict[str, Any]]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def expressions() -> list[str]:
    variables = [entry["definition"] for entry in dashboard()["templating"]["list"] if entry["type"] == "query"]
    return variables + [target["expr"] for panel in panels() for target in panel["targets"]]


def shown() -> set[str]:
    """The names of all samples of a server that has served something."""
    metrics = Metrics()
    with make_engine() as engine:
        metrics.attach("tiny", engine)
        metrics.responded("GET", "/health", 200, 0.1)
        families = list(text_string_to_metric_families(metrics.exposition().decode()))
    return {sample.name for family in families for sample in family.samples}


def test_every_metric_is_shown() -> None:
    asked = {name for expression in expressions() for name in METRIC.findall(expression)}
    assert len(asked) > 40 and asked - shown() == set()


def test_no_metric_of_the_engine_is_left_out() -> None:
    asked = {name.removeprefix(PREFIX) for expression in expressions() for name in METRIC.findall(expression)}
    assert set(GAUGES) <= asked and {f"{name}_total" for name in COUNTERS} <= asked
    for name in HISTOGRAMS:
        assert {f"{name}_bucket", f"{name}_sum"} & asked, name


def test_labels_that_are_asked_for_exist() -> None:
    metrics = Metrics()
    with make_engine() as engine:
        metrics.attach("tiny", engine)
        metrics.responded("GET", "/health", 200, 0.1)
        families = list(text_string_to_metric_families(metrics.exposition().decode()))
    labels = {sample.name: set(sample.labels) for family in families for sample in family.samples}
    for expression in expressions():
        grouped = {label for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(", ")}
        selected = set(re.findall(r"(\w+)=~", expression))
        for name in METRIC.findall(expression):
            assert (grouped | selected) <= labels[name], expression


def test_data_source_and_model_are_variables() -> None:
    names = {entry["name"]: entry["type"] for entry in dashboard()["templating"]["list"]}
    assert names == {"datasource": "datasource", "model": "query"}
    for panel in panels():
        for source in (panel["datasource"], *(target["datasource"] for target in panel["targets"])):
            assert source == {"type": "prometheus", "uid": "${datasource}"}


def test_panels_do_not_overlap_and_have_ids_of_their_own() -> None:
    everything = dashboard()["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    covered: set[tuple[int, int]] = set()
    for panel in everything:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert not covered & cells and place["x"] + place["w"] <= 24
        covered |= cells
