"""What /metrics shows of a bootstrap node: its circuits and what went through them."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from bootstrap.relay import Relay


def relay_registry(relay: Relay) -> CollectorRegistry:
    """A registry with the relay's figures, read when they are asked for."""
    registry = CollectorRegistry()
    registry.register(_RelayFigures(relay))
    return registry


class _RelayFigures(Collector):
    def __init__(self, relay: Relay) -> None:
        self._relay = relay

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("hexmesh_relay_circuits", "Circuits that run.", self._relay.n_circuits)
        yield CounterMetricFamily("hexmesh_relay_bytes", "Bytes passed on.", self._relay.n_bytes)
