"""How long the hosts of a plan may need to get its weights: read from disk, or from peers first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from hexmesh.cluster import Cluster
from hexmesh.plan import Plan

LOAD_BYTES_PER_S = 200e6
"""A cautious estimate of how fast weights are read."""
UNKNOWN_LINK_BYTES_PER_S = 10e6
"""For a link that is not measured yet."""


def load_estimate_s(plan: Plan, cluster: Cluster, holders: Collection[str]) -> float:
    """The time of the host with the most to get, as if it had nothing yet; those in `holders` have all weights.

    Whoever fetches shares the holders with the others that do, over the best measured link into it.
    """
    needed_bytes: Counter[str] = Counter()
    for replica in plan.replicas:
        for stage in replica.stages:
            needed_bytes[stage.node] += stage.needed_bytes
    n_fetching = sum(node not in holders for node in needed_bytes)
    n_sharing = max(1.0, n_fetching / max(1, len(holders)))
    return max(
        n_bytes / LOAD_BYTES_PER_S
        + (0.0 if node in holders else n_bytes * n_sharing / _rate_into(node, cluster, holders))
        for node, n_bytes in needed_bytes.items()
    )


def _rate_into(node: str, cluster: Cluster, holders: Collection[str]) -> float:
    rates = [link.bytes_per_s for link in cluster.links if link.dst == node and link.src in holders]
    return max(rates, default=UNKNOWN_LINK_BYTES_PER_S)
