"""Arrivals: rates, spreads, seeds; and requests made of arrivals and lengths."""

from __future__ import annotations

import random
import statistics
from itertools import islice, pairwise

import pytest

from hexmesh.errors import InvalidInput
from hexmesh.workload import (
    CLASSES,
    Arrivals,
    ConstantLengths,
    GammaArrivals,
    PoissonArrivals,
    Slo,
    TraceArrivals,
    Workload,
    requests,
)


def _gaps(arrivals: Arrivals, n: int = 20_000) -> list[float]:
    times = [0.0, *islice(arrivals.times_s(random.Random(11)), n)]
    return [later - earlier for earlier, later in pairwise(times)]


@pytest.mark.parametrize(
    ("arrivals", "cv"),
    [
        (PoissonArrivals(requests_per_s=4.0), 1.0),
        (GammaArrivals(requests_per_s=4.0, cv=0.3), 0.3),
        (GammaArrivals(requests_per_s=4.0, cv=2.0), 2.0),
    ],
)
def test_gaps_have_the_rate_and_the_spread(arrivals: Arrivals, cv: float) -> None:
    gaps = _gaps(arrivals)
    assert statistics.mean(gaps) == pytest.approx(0.25, rel=0.05)
    assert statistics.pstdev(gaps) / statistics.mean(gaps) == pytest.approx(cv, rel=0.05)
    assert min(gaps) >= 0
    assert arrivals.requests_per_s == 4.0


def test_a_trace_is_played_from_its_first_arrival_and_faster_if_wanted() -> None:
    trace = TraceArrivals(times=(100.0, 101.0, 104.0), speed=2.0)
    assert list(trace.times_s(random.Random(0))) == [0.0, 0.5, 2.0]
    assert trace.requests_per_s == 1.0


@pytest.mark.parametrize("times", [(2.0, 1.0), (1.0, 1.0)])
def test_a_trace_that_does_not_rise_is_refused(times: tuple[float, ...]) -> None:
    with pytest.raises(InvalidInput, match="must rise"):
        TraceArrivals(times=times)


def test_requests_are_the_same_for_the_same_seed_and_keep_their_lengths_with_other_arrivals() -> None:
    slow, fast = (Workload.of(CLASSES["HPLD"], PoissonArrivals(requests_per_s=rate)) for rate in (1.0, 5.0))
    drawn = [list(requests(slow, random.Random(5), n=200)) for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert drawn[0] != list(requests(slow, random.Random(6), n=200))
    bursts = Workload.of(CLASSES["HPLD"], GammaArrivals(requests_per_s=1.0, cv=3.0))
    in_bursts = list(requests(bursts, random.Random(5), n=200))
    assert [one.prompt_tokens for one in in_bursts] == [one.prompt_tokens for one in drawn[0]]
    faster = list(requests(fast, random.Random(5), n=200))
    assert [(one.prompt_tokens, one.output_tokens) for one in faster] == [
        (one.prompt_tokens, one.output_tokens) for one in drawn[0]
    ]
    assert faster[-1].arrival_s == pytest.approx(drawn[0][-1].arrival_s / 5)


def test_a_trace_ends() -> None:
    workload = Workload.of(ConstantLengths(prompt=3, output=4), TraceArrivals(times=(0.0, 1.0)))
    assert [one.arrival_s for one in requests(workload, random.Random(0), n=10)] == [0.0, 1.0]


def test_a_workload_without_arrivals_makes_no_requests() -> None:
    with pytest.raises(InvalidInput, match="no arrivals"):
        next(requests(Workload(), random.Random(0), n=1))


def test_means_alone_are_what_they_were() -> None:
    workload = Workload(prompt_tokens=64, output_tokens=33, max_concurrent_sequences=4)
    assert workload.mean_context_tokens == 64 + 16
    assert workload.mean_context == 64 + 16.5
    assert workload.requests_per_s is None


def test_a_distribution_gives_the_means_and_the_longer_context() -> None:
    workload = Workload.of(CLASSES["HPHD"], PoissonArrivals(requests_per_s=3.0), Slo(ttft_s=2.0))
    assert (workload.prompt_tokens, workload.output_tokens) == (1104, 398)
    assert workload.mean_context_tokens == round(CLASSES["HPHD"].mean_context)
    assert workload.requests_per_s == 3.0
    with pytest.raises(InvalidInput, match="not the means of their distribution, 1104 and 398"):
        Workload(prompt_tokens=5, lengths=CLASSES["HPHD"])


def test_limits_are_kept_together() -> None:
    slo = Slo(ttft_s=1.0, tpot_s=0.05)
    assert [slo.is_met(1.0, 0.05), slo.is_met(1.1, 0.05), slo.is_met(1.0, 0.06)] == [True, False, False]
    assert Slo().is_met(1e9, 1e9)
