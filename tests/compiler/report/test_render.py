"""The page: every section with and without something to show, nothing loaded, everything escaped, the same bytes twice."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from xml.etree import ElementTree

import pytest

from belle_compile.compiler.report import Effects, Report, render
from belle_compile.compiler.report.views import MOST_LAYERS
from belle_compile.runtime.artifact import PassRecord
from tests.compiler.engines import MANIFEST
from tests.compiler.report.pages import ACCURACY, ODD, Damage, Page, empty_report, full_report

ROOT = Path(__file__).parents[3]
REPORTS = {"full": full_report(), "by kl": full_report(kl=True), "empty": empty_report()}


@pytest.mark.parametrize("name", REPORTS)
def test_the_page_is_well_formed_and_loads_nothing(name: str) -> None:
    html = render(REPORTS[name])
    assert html.startswith("<!DOCTYPE html>\n") and html.endswith("</html>\n")
    ElementTree.fromstring(html)
    page = Page(html)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form", "audio", "video", "use"}
    attributes = {key for _, attrs in page.elements for key in attrs}
    assert not attributes & {"src", "href", "srcset", "action", "data", "style", "xlink:href"}
    assert not {key for key in attributes if key.startswith("on")}
    assert "://" not in html and "url(" not in html and "@import" not in html


@pytest.mark.parametrize("name", REPORTS)
def test_it_fits_a_phone(name: str) -> None:
    """Tables lie in containers that scroll by themselves; nothing else has a width in fixed units."""
    html = render(REPORTS[name])
    assert '<meta name="viewport" content="width=device-width, initial-scale=1" />' in html
    assert html.count("<table") == len(re.findall(r'<div class="scroll">\n<table', html))
    widths = re.findall(r"(?<![\w-])(?:min-)?width: ([^;}]+)", html.partition("</style>")[0])
    assert {width.strip() for width in widths} <= {"100%", "30rem)"}, "30rem is a condition"
    assert "prefers-color-scheme: dark" in html


def test_the_same_report_gives_the_same_bytes() -> None:
    assert render(full_report()) == render(full_report())
    assert render(empty_report()) == render(empty_report())


def test_a_report_is_plain_json() -> None:
    for report in REPORTS.values():
        plain = json.loads(json.dumps(report.to_plain(), allow_nan=False))
        assert plain["manifest"]["model"]["name"] == report.manifest.model.name
    stage = full_report().to_plain()["effects"]["stages"][3]
    assert stage["drift"] == {"kl": 0.0125, "top1": 0.96875, "max_difference": 0.05}


def test_names_are_escaped() -> None:
    html = render(full_report())
    assert "a<b>" not in html
    page = Page(html)
    for section in ("built", "passes", "layers", "coverage"):
        assert ODD in page.text(section)
    assert any(ODD in title.text for title in ElementTree.fromstring(html).iter("title") if title.text)


def test_without_anything_every_section_says_so() -> None:
    page = Page(render(empty_report()))
    assert "tiny: llama, 0.0 M parameters" in page.text("built")
    assert page.text("accuracy").endswith("Not measured: built without --calibration, or with --no-gate.")
    assert "Not measured." in page.text("passes")
    assert "Not measured: built without --calibration." in page.text("layers")
    assert page.text("coverage").endswith("No requests: built without --calibration.")
    assert page.text("memory").endswith("Not known.")


def test_what_was_built() -> None:
    page = Page(render(full_report()))
    text = page.text("built")
    for phrase in ("hidden size 32, num layers 2", "cpu, kernels for amx, avx512vnni, avx2", "scheme: w8a8; weights: int8 per",
                   "belle-compile 0.1.0", "model.safetensors SHA-256 0000", "tokenizer.json 1.2 kB SHA-256 0000"):  # fmt: skip
        assert phrase in text
    assert "engine 1.2 kB" in page.text("") and "30 70 before fusion" in page.text("")
    assert "same next token 96.1 % KL 0.00412 nats a token" in page.text("")


def test_accuracy_before_and_after_with_limits() -> None:
    text = Page(render(full_report())).text("accuracy")
    assert "20 requests, 4,000 tokens, 5 answers" in text
    for row in (
        "perplexity 12 12.12",
        "perplexity, engine to model 1 1.01 at most 1.02 ✓ kept",
        "same next token (top-1) 100.0 % 96.1 % at least 97.0 % ✗ missed",
        "KL divergence, nats a token 0 0.00412",
        "tokens of expected answers predicted 50.0 % 49.0 %",
        "of that accuracy kept 100.0 % 98.0 % at least 98.0 % ✓ kept",
        "something new 3 new limit 7",
    ):
        assert row in text


def test_the_verdict_comes_first() -> None:
    missed = Page(render(full_report())).text("")
    assert (
        "✗ Missed the accuracy gate on held-out requests, so that the build made no engine: same next token (top-1) 96.1 %, "
        in missed
    )
    assert missed.index("✗ Missed") < missed.index("same next token 96.1 %") < missed.index("engine 1.2 kB")
    limits = {"max_perplexity_ratio": 1.02, "min_top1": 0.9, "min_accuracy_kept": 0.9}
    passed = render(Report(replace(MANIFEST, accuracy={**ACCURACY, "limits": limits})))
    assert "✓ Passed the accuracy gate on held-out requests: 20 requests, 4,000 tokens, 5 answers." in Page(passed).text("")
    for accuracy in (None, {key: value for key, value in ACCURACY.items() if key != "limits"}):
        assert "accuracy gate" not in Page(render(Report(replace(MANIFEST, accuracy=accuracy)))).text("")


def test_accuracy_without_answers() -> None:
    accuracy = {**ACCURACY, "answers": 0, "answer_accuracy": None, "accuracy_kept": None}
    text = Page(render(Report(replace(MANIFEST, accuracy=accuracy)))).text("accuracy")
    assert "expected answers predicted" not in text
    assert "of that accuracy kept 100.0 % none at least 98.0 %" in text


def test_passes() -> None:
    text = Page(render(full_report())).text("passes")
    assert "over 32 tokens of a fixed text" in text
    for row in (
        "frontend 4.0 kB 70 0 100.0 % 0",
        "remove-unused 0 4.0 kB 70 0 100.0 % 0",
        f"{ODD} 8 4.0 kB 70 < 1e-6 100.0 % 2.0e-6",
        "quantize-linears 8 1.0 kB (90) 0.0125 96.9 % 0.05",
        "fuse-add-norm 4 1.0 kB 30 0.0125",
        f"{ODD}: 8 changes (keep {ODD}, bits 8); 1 note {ODD}: stays",
        "Calls in brackets",
    ):
        assert row in text


def test_drift_that_was_not_measured_says_why() -> None:
    stages = tuple(replace(stage, drift=None) for stage in full_report().effects.stages)
    effects = Effects(stages, 0, "not measured: built with --no-drift")
    text = Page(render(replace(full_report(), effects=effects))).text("passes")
    assert "Drift: not measured: built with --no-drift." in text
    assert "quantize-linears 8 1.0 kB (90) – – –" in text and "drift: KL" not in text


def test_tuned_shapes_are_notes() -> None:
    entry = {"outputs": 96, "inputs": 64, "walks": {"any": {"wide": 2, "tall": 2}}, "microseconds": {"1": [9.0, 10.0]}}
    record = PassRecord("tune-kernels", {"isa": "avx2", "machine": {"processor": "x"}, "entries": [entry]}, 1, ())
    text = Page(render(Report(replace(MANIFEST, passes=(record,))))).text("passes")
    assert "tune-kernels: 1 changes (isa avx2, machine processor x); 1 note" in text
    assert "tuned 96x64, 1 rows or more: 2x2: 1 row 9 us (-10%)" in text


def test_layers_worst_first() -> None:
    by_error, by_kl = (Page(render(full_report(kl=kl))) for kl in (False, True))
    assert f"The worst {MOST_LAYERS} of 48" in by_error.text("layers")
    assert "squared and relative to the outputs" in by_error.text("layers")
    assert "when nothing but this linear is INT8" in by_kl.text("layers")
    text = by_error.text("layers")
    assert text.index("layers.23.q 0.0024") < text.index("layers.22.q 0.0023") < text.index("layers.4.q 5.00e-4")
    assert "layers.3.q " not in text.partition("The worst 40")[2]
    profile = [attrs for tag, attrs in by_error.elements if tag == "svg" and attrs.get("class") == "profile"]
    assert len(profile) == 1 and profile[0]["viewbox"] == "0 0 24 100"


def test_few_layers_without_a_place() -> None:
    page = Page(render(replace(full_report(), layers=[Damage("lm_head", 10, 0.0)])))
    assert "All 1 lm_head 0" in page.text("layers")


def test_coverage_of_any_shape() -> None:
    text = Page(render(full_report())).text("coverage")
    for phrase in (
        "set 0123abcd", "requests kept 900, held out 100", "length histogram 1 to 16 200 17 to 32 700",
        f"label shares chat 75.0 % {ODD} 25.0 %", "token coverage 31.0 %", "dropped reason requests a duplicate 12",
        "length: unit tokens", "length: read least 1, mean 30.2, greatest 90", "1 to 1 10, of all 60 2 to 3 5, of all 40",
        f"labels: route {ODD} 50.0 %, of all 100.0 %",
        "nested: inner a 1 b 2 c 3 d 4 e 5", "nested: words x, y", "nested: none none", "nested: yes yes", "empty none",
        "empty list none",
    ):  # fmt: skip
        assert phrase in text, phrase


def test_memory() -> None:
    page = Page(render(full_report()))
    text = page.text("memory")
    for phrase in (
        "A host needs 1.0 MB.", "weights 1.7 kB", "activations (arena) 4.1 kB", "KV cache for 2,048 tokens 204.8 kB",
        "process 838.0 kB", "embedding 600 B", "100 B a token", "1.6 kB a block of 16 tokens", "409.6 kB for a sequence",
        "3 buffers of 4.2 kB in all share an arena of 4.1 kB", "the first 40 calls of a step", "all 50 calls of a step",
    ):  # fmt: skip
        assert phrase in text, phrase
    drawings = [attrs["viewbox"] for tag, attrs in page.elements if tag == "svg" and attrs.get("class") == "arena"]
    assert drawings == ["0 0 40 100", "0 0 50 100"]
    assert ("rect", {"x": "1", "y": "50.0", "width": "39", "height": "50.0"}) in page.elements
    assert ("rect", {"x": "1", "y": "50.0", "width": "49", "height": "50.0"}) in page.elements


def test_the_template_is_shipped() -> None:
    assert (files("belle_compile.compiler.report") / "report.html.jinja").is_file()
    shipped = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'package-data\]\n"\*" = \[.*"\*\.jinja".*\]', shipped)
