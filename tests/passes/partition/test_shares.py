"""Which part a rank has: nothing is missing, nothing is there twice, nobody has nothing."""

from __future__ import annotations

import pytest

from belle_compile.compiler.errors import CompileError
from belle_compile.passes.partition.shares import heads, share


@pytest.mark.parametrize(("total", "unit"), [(40, 1), (40, 16), (311, 16), (8, 1), (11008, 256), (250880, 16)])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_shares_are_contiguous_and_nearly_equal(total: int, unit: int, ranks: int) -> None:
    parts = [share(total, unit, rank, ranks, "channels") for rank in range(ranks)]
    ends = [0, *(stop for _, stop in parts)]
    assert ends == [*(start for start, _ in parts), total]
    assert all(start % unit == 0 for start, _ in parts)
    sizes = [-(-(stop - start) // unit) for start, stop in parts]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1 and sizes[-1]


def test_fewer_units_than_ranks() -> None:
    with pytest.raises(CompileError, match=r"^partition: channels of mlp for 4 ranks: found 40, in units of 16, expected "
                       r"4 units or more; build for at most 3 ranks, or otherwise\.$"):  # fmt: skip
        share(40, 16, 0, 4, "channels of mlp", "otherwise")
    with pytest.raises(
        CompileError, match=r"^partition: heads for 2 ranks: found 1, expected 2 units or more; build for one rank\.$"
    ):
        share(1, 1, 0, 2, "heads")


def test_key_value_heads_go_with_their_query_heads() -> None:
    assert [heads(12, 3, 1, rank, 2) for rank in range(2)] == [((0, 8), (0, 2)), ((8, 12), (2, 3))]
    assert [heads(5, 5, 4, rank, 2) for rank in range(2)] == [((0, 4), (0, 4)), ((4, 5), (4, 5))]


def test_fewer_key_value_heads_than_ranks() -> None:
    """Each is on several ranks, which have different query heads of it."""
    assert [heads(6, 2, 1, rank, 4) for rank in range(4)] == [
        ((0, 2), (0, 1)), ((2, 3), (0, 1)), ((3, 5), (1, 2)), ((5, 6), (1, 2)),
    ]  # fmt: skip
    with pytest.raises(CompileError, match=r"^partition: key/value heads for 3 ranks: found 2 of 3 query heads each, expected "
                       r"a divisor of the ranks; build for 2 ranks\.$"):  # fmt: skip
        heads(6, 2, 1, 0, 3)
    with pytest.raises(CompileError, match=r"query heads of a key/value head for 4 ranks: found 3, expected 4 units or more"):
        heads(3, 1, 1, 0, 4)
    with pytest.raises(
        CompileError, match=r"found 2 of 3 query heads each, expected query heads in groups of 2; build for 2 ranks"
    ):
        heads(6, 2, 2, 0, 4)
