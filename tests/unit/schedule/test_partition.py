"""Partitions of a few places into replicas, against brute force."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from hexmesh.schedule.partition import best_partition


def partitions(places: Sequence[int]) -> Iterator[list[tuple[int, ...]]]:
    """Every way to put some of the places into disjoint sets."""
    if not places:
        yield []
        return
    first, *others = places
    yield from partitions(others)
    for n in range(len(others) + 1):
        for company in itertools.combinations(others, n):
            for rest in partitions([place for place in others if place not in company]):
                yield [(first, *company), *rest]


def random_rates(n: int, rng: random.Random) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Rates of all subsets, some impossible, many equal."""
    few = rng.random() < 0.5
    rates = [rng.choice((0.0, 1.0, 2.0, 3.0)) if few else rng.random() for _ in range(1 << n)]
    possible = [rng.random() < 0.6 for _ in rates]
    return np.array([rate * ok for rate, ok in zip(rates, possible, strict=True)]) * (np.arange(1 << n) > 0)


@pytest.mark.parametrize("seed", range(60))
def test_most_replicas_with_fewest_stages_among_the_best_sums(seed: int) -> None:
    rng = random.Random(seed)
    n, tolerance = rng.randint(1, 6), rng.choice((0.0, 0.01, 0.3))
    rates = random_rates(n, rng)

    def rate(parts: list[tuple[int, ...]]) -> float:
        return sum(float(rates[sum(1 << place for place in part)]) for part in parts)

    possible = [
        parts
        for parts in partitions(range(n))
        if parts and all(rates[sum(1 << place for place in part)] > 0 for part in parts)
    ]
    found = best_partition(rates, tolerance)
    if not possible:
        assert found is None
        return
    assert found is not None
    best = max(map(rate, possible))
    good = [parts for parts in possible if rate(parts) >= best * (1 - max(tolerance, 1e-9))]
    most = max(len(parts) for parts in good)
    fewest = min(sum(map(len, parts)) for parts in good if len(parts) == most)
    assert found.best_rate == pytest.approx(best)
    assert (len(found.subsets), sum(subset.bit_count() for subset in found.subsets)) == (most, fewest)
    assert sum(found.subsets) == int(np.bitwise_or.reduce(found.subsets)), "two subsets share a place"
    assert found.rate == pytest.approx(sum(float(rates[subset]) for subset in found.subsets))
    assert found.rate >= best * (1 - max(tolerance, 1e-9)) * (1 - 1e-12)
    for place in range(n):
        with_place = [parts for parts in possible if any(place in part for part in parts)]
        assert found.rate_with[place][0] == pytest.approx(max(map(rate, with_place), default=0.0))
