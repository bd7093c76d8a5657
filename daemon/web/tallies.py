"""Metrics that are written once a token and read once in a while: plain numbers, made samples when they are asked for.

prometheus_client's own locks, labels and loops over buckets cost more than all else that is done for a token.
Written and read on the event loop alone.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from hexmesh.metrics import MetricSpec


class CounterTally(Collector):
    """A counter without labels."""

    def __init__(self, spec: MetricSpec) -> None:
        self._spec = spec
        self.n = 0

    def describe(self) -> list[Metric]:
        return [CounterMetricFamily(self._spec.name, self._spec.help)]

    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily(self._spec.name, self._spec.help, value=self.n)


class HistogramTally(Collector):
    """A histogram without labels."""

    def __init__(self, spec: MetricSpec) -> None:
        self._spec = spec
        self._bounds = spec.buckets
        self._counts = [0] * (len(spec.buckets) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def describe(self) -> list[Metric]:
        return [HistogramMetricFamily(self._spec.name, self._spec.help)]

    def collect(self) -> Iterator[Metric]:
        n, buckets = 0, []
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            n += count
            buckets.append((_bound_text(bound), float(n)))
        yield HistogramMetricFamily(self._spec.name, self._spec.help, buckets=buckets, sum_value=self._sum)


def _bound_text(bound: float) -> str:
    """As prometheus_client writes a bucket's bound."""
    return "+Inf" if bound == float("inf") else repr(bound)
