"""Metrics written once a token look to whoever scrapes them like prometheus_client's own."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from daemon.web.tallies import CounterTally, HistogramTally
from hexmesh import metrics


@given(st.lists(st.sampled_from([0.0, 0.0005, 0.001, 0.0011, 0.3, 80.0, 81.0, 1e6]), max_size=12))
def test_a_histogram(values: Sequence[float]) -> None:
    spec = metrics.INTER_TOKEN_LATENCY
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    tally = HistogramTally(spec)
    ours.register(tally)
    histogram = Histogram(spec.name, spec.help, buckets=spec.buckets, registry=theirs)
    for value in values:
        tally.observe(value)
        histogram.observe(value)
    assert generate_latest(ours) == generate_latest(theirs)


def test_a_counter() -> None:
    spec = metrics.GENERATION_TOKENS
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    tally = CounterTally(spec)
    ours.register(tally)
    counter = Counter(spec.name, spec.help, registry=theirs)
    assert generate_latest(ours) == generate_latest(theirs)
    tally.n += 7
    counter.inc(7)
    assert generate_latest(ours) == generate_latest(theirs)


def test_a_name_is_taken_once() -> None:
    registry = CollectorRegistry()
    registry.register(HistogramTally(metrics.INTER_TOKEN_LATENCY))
    with pytest.raises(ValueError, match="hexmesh_inter_token_latency_seconds"):
        registry.register(HistogramTally(metrics.INTER_TOKEN_LATENCY))
