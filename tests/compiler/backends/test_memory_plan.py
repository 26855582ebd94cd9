"""Memory plans: nothing alive at the same time overlaps, and the arena is not larger than it must be."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st

from belle_compile.compiler.backends.program.memory_plan import ALIGNMENT, Lifetime, plan_memory

lifetimes = st.builds(
    lambda size, first, length: Lifetime(size, first, first + length),
    st.integers(1, 10_000),
    st.integers(0, 20),
    st.integers(0, 6),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(lifetimes, max_size=12))
def test_buffers_alive_together_do_not_overlap(buffers: list[Lifetime]) -> None:
    plan = plan_memory(buffers)
    for (a, start_a), (b, start_b) in combinations(zip(buffers, plan.offsets, strict=True), 2):
        assert not a.overlaps(b) or start_a + a.size <= start_b or start_b + b.size <= start_a
    for buffer, offset in zip(buffers, plan.offsets, strict=True):
        assert offset % ALIGNMENT == 0
        assert offset + buffer.size <= plan.arena_bytes


def test_a_chain_needs_two_buffers() -> None:
    chain = [Lifetime(1024, i, i + 1) for i in range(8)]
    assert plan_memory(chain).arena_bytes == 2048


def test_an_empty_plan_is_empty() -> None:
    assert plan_memory([]).arena_bytes == 0
