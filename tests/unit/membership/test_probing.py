"""Rate probes against links whose true rate is known."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

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

START_BYTES = 14_480


@dataclass
class Tcp:
    """A connection as a probe sees it: the window doubles each round trip up to what the buffers or the link hold.

    Whole windows arrive at once, as from a sender that is limited by its buffer: the hardest case to average.
    """

    bytes_per_s: float
    rtt_s: float
    buffer_bytes: float = 64e6
    noise: float = 0.0
    report_s: float = 0.005

    def reports(self, rng: random.Random) -> Iterator[tuple[int, float]]:
        """(bytes so far, when) at the receiver, without end."""
        window, sent, now_s = float(START_BYTES), 0.0, 0.0
        while True:
            window_s = window / (self.bytes_per_s * (1 + rng.uniform(-self.noise, self.noise)))
            n_reports = max(1, int(window_s / self.report_s))
            for i in range(1, n_reports + 1):
                yield int(sent + window * i / n_reports), now_s + window_s * i / n_reports
            sent += window
            now_s += max(window_s, self.rtt_s)
            window = min(2 * window, self.buffer_bytes, max(START_BYTES, 2 * self.bytes_per_s * self.rtt_s))

    def measure(self, budget: ProbeBudget, seed: int = 1) -> tuple[RateEstimate, float, int]:
        """(estimate, seconds, bytes) of a probe."""
        probe = RateProbe(budget, self.rtt_s)
        n_bytes, spent_s = 0, 0.0
        for n_bytes, spent_s in self.reports(random.Random(seed)):
            probe.record(n_bytes, spent_s)
            if probe.is_over(n_bytes, spent_s):
                break
        estimate = probe.estimate()
        assert estimate is not None
        return estimate, spent_s, n_bytes


def worst_bytes(budget: ProbeBudget, tcp: Tcp) -> float:
    return budget.n_bytes + tcp.bytes_per_s * 2 * tcp.report_s


@pytest.mark.parametrize("rtt_s", [0.0001, 0.002, 0.04, 0.15, 0.22])
@pytest.mark.parametrize("bytes_per_s", [1.25e6, 12.5e6, 25e6])
def test_a_steady_link_is_measured_without_its_ramp(bytes_per_s: float, rtt_s: float) -> None:
    tcp = Tcp(bytes_per_s, rtt_s)
    estimate, spent_s, n_bytes = tcp.measure(FULL_PROBE)
    assert estimate == RateEstimate(pytest.approx(bytes_per_s, rel=0.05), lower_bound=False)  # type: ignore[arg-type]
    assert n_bytes <= worst_bytes(FULL_PROBE, tcp)
    assert spent_s <= FULL_PROBE.time_s + FULL_PROBE.n_rtts * rtt_s


@pytest.mark.parametrize("rtt_s", [0.04, 0.15, 0.22])
def test_a_connection_that_its_buffer_limits_gives_what_it_carries(rtt_s: float) -> None:
    estimate, _, n_bytes = Tcp(125e6, rtt_s, buffer_bytes=3.4e6).measure(FULL_PROBE)
    assert estimate == RateEstimate(pytest.approx(3.4e6 / rtt_s, rel=0.1), lower_bound=False)  # type: ignore[arg-type]
    assert n_bytes <= 40e6


@pytest.mark.parametrize("rtt_s", [0.15, 0.22])
def test_a_probe_that_ends_on_the_ramp_says_so(rtt_s: float) -> None:
    """A fast, far link with large buffers: 64 MB are sent before the ramp is over."""
    estimate, _, n_bytes = Tcp(1.25e9, rtt_s).measure(FULL_PROBE)
    assert estimate.lower_bound
    assert 20e6 < estimate.bytes_per_s < 1.25e9
    assert n_bytes <= FULL_PROBE.n_bytes + 10e6


def test_a_quick_probe_of_a_far_link_is_a_lower_bound() -> None:
    estimate, spent_s, n_bytes = Tcp(125e6, 0.22).measure(QUICK_PROBE)
    assert estimate.lower_bound
    assert estimate.bytes_per_s < 60e6
    assert spent_s < 2.0
    assert n_bytes <= QUICK_PROBE.n_bytes


def test_a_quick_probe_of_a_near_link_takes_a_moment() -> None:
    estimate, spent_s, n_bytes = Tcp(80e6, 0.0002).measure(QUICK_PROBE)
    assert estimate == RateEstimate(pytest.approx(80e6, rel=0.05), lower_bound=False)  # type: ignore[arg-type]
    assert spent_s < 0.08
    assert n_bytes < QUICK_PROBE.n_bytes


def test_rounds_that_never_agree_give_a_lower_bound() -> None:
    tcp = Tcp(50e6, 0.1, noise=0.6)
    estimate, spent_s, n_bytes = tcp.measure(FULL_PROBE, seed=4)
    assert estimate.lower_bound
    assert 20e6 < estimate.bytes_per_s < 130e6
    assert spent_s <= FULL_PROBE.time_s + 25 * tcp.rtt_s
    assert n_bytes <= FULL_PROBE.n_bytes + 10e6


def test_a_rate_that_climbs_steadily_is_not_taken_for_the_end_of_the_ramp() -> None:
    """Within a tenth of each other, but more each time: congestion control still finds room."""
    probe = RateProbe(ProbeBudget(n_bytes=10**9, time_s=10.0, n_rtts=0, round_s=0.1), 0.01)
    n_bytes = 0.0
    for i in range(1, 8):
        n_bytes += 1e6 * 1.04**i
        probe.record(int(n_bytes), 0.1 * i)
        assert not probe.is_over(int(n_bytes), 0.1 * i)


def test_a_link_too_slow_for_three_rounds_gives_a_lower_bound() -> None:
    probe = RateProbe(FULL_PROBE, 0.05)
    probe.record(4096, 0.2)
    assert probe.estimate() == RateEstimate(bytes_per_s=4096 / 0.2, lower_bound=True)


def test_a_first_burst_is_not_taken_for_the_rate() -> None:
    """What arrives at once after a round trip says nothing of the next one."""
    probe = RateProbe(FULL_PROBE, 0.2)
    probe.record(14_000, 0.0001)
    assert probe.estimate() == RateEstimate(bytes_per_s=70_000, lower_bound=True)


def test_chunks_grow_with_the_rate_and_stay_bounded() -> None:
    probe = RateProbe(FULL_PROBE, 0.01)
    assert (probe.chunk_bytes, probe.queue_bytes) == (4096, 65536)
    probe.record(10**6, 0.1)
    assert probe.chunk_bytes == 100_000
    probe.record(10**9, 0.2)
    assert probe.chunk_bytes == 256 * 1024


def test_nothing_arrived_no_estimate() -> None:
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
