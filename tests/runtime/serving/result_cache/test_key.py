"""What a cached answer is found by."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import belle_compile
from belle_compile.runtime.serving.grammar.source import Grammar
from belle_compile.runtime.serving.request import NOT_IN_KEY, EngineIdentity, Request
from tests.runtime.distributed.test_executor import engine_of
from tests.runtime.fakes import make_engine

# Of a kind whose sources are any text.
st.register_type_strategy(Grammar, st.builds(Grammar, st.sampled_from(["regex", "lark"]), st.text()))

# A busy machine takes longer for an example than hypothesis allows by default, and to draw one.
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
ENGINE = EngineIdentity("ab" * 32, "0.1.0", "kernels-avx2", 1)


def strategies(record: type) -> dict[str, st.SearchStrategy[Any]]:
    """Any value of its type for each field, so that a new field is tested too."""
    return {name: st.from_type(kind) for name, kind in typing.get_type_hints(record).items()}


@UNHURRIED
@given(st.data())
def test_any_changed_field_changes_the_key(data: st.DataObject) -> None:
    of_field = strategies(Request)
    request = data.draw(st.builds(Request, **of_field))
    name = data.draw(st.sampled_from(sorted(of_field)))
    value = data.draw(of_field[name])
    assume(repr(value) != repr(getattr(request, name)))  # 0.0 is -0.0, and NaN is not NaN
    changed = dataclasses.replace(request, **{name: value})
    assert (changed.key(ENGINE) == request.key(ENGINE)) == (name in NOT_IN_KEY)


@UNHURRIED
@given(st.data())
def test_any_change_of_the_engine_changes_the_key(data: st.DataObject) -> None:
    request = data.draw(st.builds(Request, **strategies(Request)))
    one, other = (data.draw(st.builds(EngineIdentity, **strategies(EngineIdentity))) for _ in range(2))
    assert (request.key(one) == request.key(other)) == (one == other)


def test_an_engine_says_what_computes_its_answers() -> None:
    with make_engine(digest="ab" * 32) as engine:
        assert engine.identity == EngineIdentity("ab" * 32, belle_compile.__version__, "kernels-avx2", 1)


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_kernels_of_all_ranks_count(ranks: int) -> None:
    with engine_of(ranks) as (engine, _):
        assert engine.identity.kernels == ", ".join(f"kernels-{rank}" for rank in range(ranks))
