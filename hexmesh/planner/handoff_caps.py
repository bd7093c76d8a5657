"""How many requests a second two replicas may hand over at most, each way by itself: by all pairs of placements.

A cap is the tightest of the NICs, links and lines that the pair's KV crosses; others that share them are left out, so
it is never below what a plan's flow program allows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from hexmesh.cluster import Cluster
from hexmesh.score.flow_program import Limit

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.intp]

_MOST_PAIRS = 2_000_000
_NO_WAY = 1e9
"""A price that nobody pays."""


class HandoffCaps:
    """Of one cluster and one size of KV."""

    def __init__(self, cluster: Cluster, layer_bytes: float) -> None:
        """`layer_bytes` is the KV of one prompt in one layer."""
        self._n_hosts = len(cluster.nodes)
        ids = [node.id for node in cluster.nodes]
        links = cluster.link_table()
        ways = [(a, b) for a in range(self._n_hosts) for b in range(self._n_hosts) if a != b]
        self._missing = [way for way in ways if (ids[way[0]], ids[way[1]]) not in links]
        limits = list[tuple[Limit, list[tuple[int, int]], float]]()
        for a, b in ways:
            link = links.get((ids[a], ids[b]))
            if link is not None:
                limits.append((Limit("link", f"{ids[a]} to {ids[b]}"), [(a, b)], link.bytes_per_s))
        for at, node in enumerate(cluster.nodes):
            if node.nic is not None:
                out, into = node.nic.out_bytes_per_s, node.nic.in_bytes_per_s
                limits.append((Limit("nic_out", node.id), [way for way in ways if way[0] == at], out))
                limits.append((Limit("nic_in", node.id), [way for way in ways if way[1] == at], into))
        lines: Mapping[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
        for a, b in ways:
            lines[cluster.nodes[a].site, cluster.nodes[b].site].append((a, b))
        for line in cluster.site_links:
            name = f"{line.src} to {line.dst}"
            limits.append((Limit("line", name), lines[line.src, line.dst], line.bytes_per_s))
        self._limits = {
            limit: (ways, rate / layer_bytes) for limit, ways, rate in limits if ways and np.isfinite(rate)
        }

    def tolls(self, earned: Mapping[Limit, float]) -> Floats:
        """(hosts, hosts): what a layer's KV pays on each way, if limits earn so much when they are used up."""
        found: Floats = np.zeros((self._n_hosts, self._n_hosts))
        for limit, amount in earned.items():
            ways, layers_per_s = self._limits[limit]
            for way in ways:
                found[way] += amount / layers_per_s
        for way in self._missing:
            found[way] = _NO_WAY
        return found

    def of(self, sources: Ints, targets: Ints) -> Floats:
        """(sources, targets): requests a second; placements are (N, n_layers), the holder of each layer.

        Infinite where nothing crosses a limit, and for more pairs than can be looked at.
        """
        found = np.full((len(sources), len(targets)), np.inf)
        if found.size * max(1, len(self._limits)) > _MOST_PAIRS:
            return found
        crossing = dict[tuple[int, int], Floats]()
        for way in {way for ways, _ in self._limits.values() for way in ways} | set(self._missing):
            a, b = (sources == way[0]).astype(float), (targets == way[1]).astype(float)
            crossing[way] = a @ b.T
        for ways, layers_per_s in self._limits.values():
            layers = sum(crossing[way] for way in ways)
            with np.errstate(divide="ignore"):
                found = np.minimum(found, np.where(layers > 0, layers_per_s / layers, np.inf))
        for way in self._missing:
            found[crossing[way] > 0] = 0.0
        return found


def toll(prices: Floats, sources: Ints, targets: Ints) -> Floats:
    """(sources, targets): what a prompt's KV pays at prices (hosts, hosts) of a layer."""
    found: Floats
    if len(sources) == 1 or len(targets) == 1:
        found = prices[sources, targets].sum(axis=1).reshape(len(sources), len(targets))
        return found
    senders = np.unique(sources)
    found = np.zeros((len(sources), len(targets)))
    for sender in senders:
        found += (sources == sender).astype(float) @ prices[sender][targets].T
    return found
