"""Whether the figures that a plan was made from have changed, and stayed changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from hexmesh.cluster import Cluster

DRIFT = 0.25
"""A figure that is off by more than this share calls for another look."""
LASTING_S = 60.0
"""It must be off for so long: a probe in a busy moment is no news."""


class Drift:
    """Owned by who plans."""

    def __init__(self) -> None:
        self._planned: Mapping[tuple[str, ...], float] = {}
        self._since_s: dict[tuple[str, ...], float] = {}

    def planned_with(self, cluster: Cluster) -> None:
        """A look was taken with these figures."""
        self._planned = dict(_figures(cluster))
        self._since_s = {}

    def has_drifted(self, cluster: Cluster, now_s: float) -> bool:
        """Whether a figure has been off for long. To be asked now and then; what is new or gone is not drift."""
        off = {
            name
            for name, figure in _figures(cluster)
            if (before := self._planned.get(name)) is not None and abs(figure - before) > DRIFT * before
        }
        self._since_s = {name: self._since_s.get(name, now_s) for name in off}
        return any(now_s - since_s >= LASTING_S for since_s in self._since_s.values())


def _figures(cluster: Cluster) -> Iterator[tuple[tuple[str, ...], float]]:
    """Rates of devices and links. Delays under a millisecond do not count: their share means nothing."""
    for node in cluster.nodes:
        for device in node.devices:
            yield (node.id, str(device.index), "flops"), device.flops_per_s
            yield (node.id, str(device.index), "bytes"), device.bytes_per_s
    for link in cluster.links:
        yield (link.src, link.dst, "rtt"), max(link.rtt_p50_s, 1e-3)
        yield (link.src, link.dst, "bytes"), link.bytes_per_s
