"""Tables of methods: rows that are measured later."""

from __future__ import annotations

import pytest

from benchmarks.methods import ROWS, markdown, merged

ABOUT = {"model": "m", "calibration": 40, "held_out": 20, "machine": {"processor": "p", "date": "d", "command": "all rows"}}
LATER = ABOUT | {"machine": {"processor": "p", "date": "d", "command": "one row"}}


def kept(kl: float) -> dict[str, float]:
    return {"top1_agreement": 0.9, "kl": kl, "perplexity_ratio": 1.0}


def test_a_row_comes_into_the_table_of_its_case_in_order() -> None:
    old = ABOUT | {"results": {"clean": {"int8": kept(1.0), "int4": kept(2.0)}, "hard": {"int8": kept(3.0)}}}
    new = LATER | {"results": {"clean": {"int4": kept(4.0), "int8: static": kept(5.0)}}}
    tables = merged(old, new)
    assert tables == {"clean": {"int8": kept(1.0), "int8: static": kept(5.0), "int4": kept(4.0)}, "hard": {"int8": kept(3.0)}}
    assert list(tables["clean"]) == ["int8", "int8: static", "int4"] and set(tables["clean"]) <= {row.name for row in ROWS}
    assert "| int8: static | 0.9000 | 5.00000 | 1.0000 |" in markdown(LATER | {"results": tables})


@pytest.mark.parametrize(("change", "named"), [({"held_out": 4}, "held_out"), ({"machine": {"date": "e"}}, "machine")])
def test_other_windows_or_another_machine_make_no_row(change: dict[str, object], named: str) -> None:
    with pytest.raises(SystemExit, match=f"have another {named}: measure all rows again"):
        merged(ABOUT | {"results": {}}, ABOUT | {"results": {}} | change)
