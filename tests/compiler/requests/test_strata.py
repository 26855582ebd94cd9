"""Places shared out among strata, and samples that do not depend on the order of what is offered."""

from __future__ import annotations

import random

import pytest

from belle_compile.compiler.requests.request import Request
from belle_compile.compiler.requests.strata import Sample, apportion, bucket, bucket_bounds


def test_buckets_are_powers_of_two() -> None:
    assert [bucket(length) for length in (0, 1, 2, 3, 4, 7, 8, 1023, 1024)] == [0, 1, 2, 2, 3, 3, 4, 10, 11]
    for number in range(12):
        least, greatest = bucket_bounds(number)
        assert bucket(least) == bucket(greatest) == number
        assert number == 0 or (bucket(least - 1), bucket(greatest + 1)) == (number - 1, number + 1)


@pytest.mark.parametrize(
    ("places", "weights", "most", "expected"),
    [
        (10, [50, 30, 20], [50, 30, 20], [5, 3, 2]),
        (10, [97, 1, 1, 1], [97, 1, 1, 1], [7, 1, 1, 1]),  # at least one each
        (2, [90, 6, 4], [90, 6, 4], [2, 0, 0]),  # no room for one each: the shares decide
        (10, [60, 40], [3, 40], [3, 7]),  # what one cannot take the others get
        (10, [4, 3], [4, 3], [4, 3]),
        (4, [5, 0, 5], [5, 5, 0], [4, 0, 0]),
        (0, [5], [5], [0]),
        (3, [], [], []),
        (3, [1, 1], [9, 9], [2, 1]),
    ],
)
def test_apportion(places: int, weights: list[int], most: list[int], expected: list[int]) -> None:
    assert apportion(places, weights, most) == expected


def test_apportion_stays_within_one_of_the_shares() -> None:
    chance = random.Random(1)
    for _ in range(200):
        weights = [chance.randrange(40, 1000) for _ in range(chance.randrange(1, 20))]
        places = chance.randrange(40, sum(weights))
        given = apportion(places, weights, weights)
        assert sum(given) == places
        for count, weight in zip(given, weights, strict=True):
            assert abs(count - places * weight / sum(weights)) < 2


def test_a_sample_keeps_the_least_priorities_in_any_order() -> None:
    offers = [(chance, Request(text=str(chance), line=chance)) for chance in random.Random(2).sample(range(1000), 100)]
    expected = sorted(offers, key=lambda offer: offer[0])[:7]
    for seed in range(3):
        random.Random(seed).shuffle(offers)
        sample = Sample(10)
        for priority, request in offers:
            sample.offer(priority, request)
        assert sample.offered == 100
        assert sample.chosen(7) == [request for _, request in expected]
