"""Rate probes against links whose true rate is known."""

from __future__ import annotations

import random

import pytest

from hexmesh.membership.probing import (
    FULL_PROBE,
    QUICK_PROBE,
    ProbeBudget,
    RateEstimate,
    RateProbe,
    RttWindow,
    quantile,
)


def measure(
    budget: ProbeBudget, *, bytes_per_s: float, rtt_s: float, noise: float = 0.0, seed: int = 1
) -> tuple[RateEstimate, float, int]:
    """(estimate, seconds, bytes) of a probe over an ideal link with multiplicative noise."""
    rng = random.Random(seed)
    probe = RateProbe(budget, rtt_s)
    spent_s, spent_bytes = 0.0, 0
    while (n_bytes := probe.next_window_bytes()) is not None:
        seconds = rtt_s + n_bytes / bytes_per_s * (1 + rng.uniform(-noise, noise))
        probe.record(n_bytes, seconds)
        spent_s += seconds
        spent_bytes += n_bytes
    estimate = probe.estimate()
    assert estimate is not None
    return estimate, spent_s, spent_bytes


@pytest.mark.parametrize("rtt_s", [0.0001, 0.001, 0.02, 0.15])
@pytest.mark.parametrize("bytes_per_s", [1e5, 1.25e6, 12.5e6, 125e6, 250e6])
def test_a_steady_link_is_measured_within_the_budget(bytes_per_s: float, rtt_s: float) -> None:
    estimate, spent_s, spent_bytes = measure(FULL_PROBE, bytes_per_s=bytes_per_s, rtt_s=rtt_s)
    assert estimate.bytes_per_s == pytest.approx(bytes_per_s, rel=0.05)
    assert spent_bytes <= FULL_PROBE.n_bytes
    assert spent_s <= 3 * (FULL_PROBE.time_s + 8 * rtt_s)


@pytest.mark.parametrize(
    ("bytes_per_s", "rtt_s"), [(12.5e6, 0.02), (125e6, 0.001), (125e6, 0.15), (2e8, 1e-4)]
)
def test_three_windows_agree_on_a_steady_link(bytes_per_s: float, rtt_s: float) -> None:
    estimate, spent_s, _ = measure(FULL_PROBE, bytes_per_s=bytes_per_s, rtt_s=rtt_s)
    assert not estimate.lower_bound
    assert spent_s <= FULL_PROBE.time_s + 8 * rtt_s


def test_a_quick_probe_of_a_fast_link_takes_a_moment() -> None:
    estimate, spent_s, spent_bytes = measure(QUICK_PROBE, bytes_per_s=200e6, rtt_s=0.0002)
    assert estimate == RateEstimate(bytes_per_s=pytest.approx(200e6, rel=0.01), lower_bound=False)  # type: ignore[arg-type]
    assert spent_s < 0.03
    assert spent_bytes < 5e6


def test_windows_that_never_agree_give_a_lower_bound() -> None:
    estimate, spent_s, spent_bytes = measure(FULL_PROBE, bytes_per_s=50e6, rtt_s=0.001, noise=0.6, seed=3)
    assert estimate.lower_bound
    assert 20e6 < estimate.bytes_per_s < 130e6
    assert spent_s <= FULL_PROBE.time_s + 0.5
    assert spent_bytes <= FULL_PROBE.n_bytes


def test_a_link_too_slow_for_three_windows_gives_a_lower_bound() -> None:
    estimate, _, _ = measure(FULL_PROBE, bytes_per_s=2e4, rtt_s=0.05)
    assert estimate == RateEstimate(bytes_per_s=pytest.approx(2e4, rel=0.02), lower_bound=True)  # type: ignore[arg-type]


def test_no_window_no_estimate() -> None:
    assert RateProbe(FULL_PROBE, 0.01).estimate() is None


def test_round_trips_keep_the_latest() -> None:
    window = RttWindow(size=4)
    for rtt_s in (9.0, 9.0, 1.0, 2.0, 3.0, 4.0):
        window.add(rtt_s)
    assert (len(window), window.p50_s, window.p95_s) == (4, 2.0, 4.0)


def test_quantiles_by_nearest_rank() -> None:
    samples = [float(value) for value in range(1, 21)]
    assert [quantile(samples, q) for q in (0.0, 0.05, 0.5, 0.95, 1.0)] == [1.0, 1.0, 10.0, 19.0, 20.0]
    assert quantile([7.0], 0.5) == 7.0
