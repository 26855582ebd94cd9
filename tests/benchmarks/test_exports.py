"""The table of exports in docs/accuracy.md is that of the results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")  # the build extra, which the benchmark needs

from benchmarks import exports

ROOT = Path(__file__).parent.parent.parent


def test_the_table_is_that_of_the_results() -> None:
    results = json.loads(exports.RESULTS.read_text(encoding="utf-8"))["results"]
    table = exports.table(results)
    assert len(table.splitlines()) == 2 + len(results), "every result has a row"
    assert table in (ROOT / "docs/accuracy.md").read_text(encoding="utf-8")


def test_every_row_without_an_export_has_a_quantizer() -> None:
    own = [row.runtime.title for row in exports.ROWS if row.options is None]
    assert own and set(own) == set(exports.OWN)
    assert len({row.name for row in exports.ROWS}) == len(exports.ROWS)
