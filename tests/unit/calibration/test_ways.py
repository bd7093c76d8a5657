"""The overhead of ways is found again from round trips, and lengthens links."""

from __future__ import annotations

import math
import random
from itertools import permutations

import pytest

from hexmesh.calibration import Trip, WayFit, lengthened
from hexmesh.calibration.ways import MOST_WAY_S
from hexmesh.cluster import Link

NODES = ("a", "b", "c")
LINKS = {
    (src, dst): Link(
        src=src, dst=dst, rtt_p50_s=0.01 * at, rtt_p95_s=0.02 * at, bytes_per_s=1e6 * at, lower_bound=False
    )
    for at, (src, dst) in enumerate(permutations(NODES, 2), start=1)
}
TRUE_S = 0.003


def trip(nodes: tuple[str, ...] = NODES, payload_bytes: float = 4096.0, way_s: float = TRUE_S) -> Trip:
    """Written out for a pipeline over a, b and c: ab and bc there with the bytes, ca back without."""
    assert nodes in (NODES, ("a", "a", "b", "b", "c"))
    ab, bc, ca = LINKS["a", "b"], LINKS["b", "c"], LINKS["c", "a"]
    delays_s = (ab.rtt_p50_s + bc.rtt_p50_s + ca.rtt_p50_s) / 2
    sends_s = payload_bytes / ab.bytes_per_s + payload_bytes / bc.bytes_per_s
    return Trip(nodes, payload_bytes, delays_s + sends_s + 3 * way_s)


def fitted(trips: list[Trip], *, n_rows: int = 1, n_tokens: int = 1, queue_s: float = 0.0) -> float | None:
    fit = WayFit()
    for one in trips:
        fit.observe(one, n_rows=n_rows, n_tokens=n_tokens, queue_s=queue_s)
    return fit.way_s(LINKS)


def test_the_overhead_is_found_again_under_noise_and_outliers() -> None:
    rng = random.Random(1)
    fit = WayFit()
    for at in range(200):
        n_rows = rng.choice((1, 2, 4, 8))
        noise_s = 0.3 if at % 10 == 0 else rng.gauss(0, 3e-4)
        fit.observe(
            trip(payload_bytes=4096.0 * n_rows, way_s=TRUE_S + noise_s),
            n_rows=n_rows,
            n_tokens=n_rows,
            queue_s=0.0,
        )
    assert fit.way_s(LINKS) == pytest.approx(TRUE_S, rel=0.1)


def test_stages_on_one_host_have_no_way_between_them() -> None:
    assert fitted([trip(("a", "a", "b", "b", "c"))] * 20) == pytest.approx(TRUE_S)


def test_what_says_nothing_of_ways_is_left_out() -> None:
    assert fitted([trip()] * 19) is None
    assert fitted([trip()] * 20) == pytest.approx(TRUE_S)
    assert fitted([trip()] * 40, n_tokens=64) is None  # prompts
    assert fitted([trip()] * 40, queue_s=0.1) is None
    assert fitted([Trip(("a",), 4096.0, 0.1)] * 40) is None  # one host
    assert fitted([Trip(("a", "x"), 4096.0, 0.1)] * 40) is None  # no such link


def test_the_overhead_stays_within_bounds() -> None:
    assert fitted([trip(way_s=-TRUE_S)] * 20) == 0.0
    assert fitted([trip(way_s=1.0)] * 20) == MOST_WAY_S


def test_few_steps_alone_count_beside_many_in_company() -> None:
    fit = WayFit()
    for n_rows, way_s, n in ((8, 0.004, 1000), (1, TRUE_S, 24)):
        for _ in range(n):
            fit.observe(trip(way_s=way_s), n_rows=n_rows, n_tokens=n_rows, queue_s=0.0)
    assert fit.way_s(LINKS) == pytest.approx(TRUE_S)


def test_what_disturbs_more_than_half_of_the_steps_changes_little() -> None:
    rng = random.Random(2)
    trips = [trip(way_s=TRUE_S + (rng.uniform(0, 0.01) if at % 3 else 0.0)) for at in range(60)]
    assert fitted(trips) == pytest.approx(TRUE_S, rel=0.1)


def test_links_become_longer_by_the_median_of_what_is_told() -> None:
    (same,) = lengthened([LINKS["a", "b"]], [])
    assert same == LINKS["a", "b"]
    (longer,) = lengthened([LINKS["a", "b"]], [0.001, 0.002, 0.02])
    assert longer.rtt_p50_s == pytest.approx(LINKS["a", "b"].rtt_p50_s + 0.004)  # there and back
    assert math.isclose(
        longer.rtt_p95_s - longer.rtt_p50_s, LINKS["a", "b"].rtt_p95_s - LINKS["a", "b"].rtt_p50_s
    )
    assert longer.bytes_per_s == LINKS["a", "b"].bytes_per_s
