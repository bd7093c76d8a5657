"""A cluster's wires, looked up once: which limits a handoff between two hosts meets, and where only NICs and lines do.

Most pairs of hosts need no limit of their own: their link is no slower than a NIC at its ends or the line between their
sites. Hosts among which all pairs are such form a *hub*: KV from one to another takes from the sender's NIC, the line
and the receiver's NIC, whoever the partner is, so that a flow program needs no variable for each pair.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from hexmesh.cluster import Cluster, Link, Nic

Way = tuple[str, str]
"""From a node to a node."""


@dataclass(frozen=True)
class Network:
    """What the hosts of one cluster can send each other."""

    cluster: Cluster
    is_coarse: bool = False
    """Whether handoffs are counted in full where some layers stay on their node: fewer variables, a lower rate."""

    @cached_property
    def links(self) -> dict[Way, Link]:
        """Links by (source, destination)."""
        return self.cluster.link_table()

    @cached_property
    def nics(self) -> dict[str, Nic]:
        """Those that are known, by node."""
        return {node.id: node.nic for node in self.cluster.nodes if node.nic is not None}

    @cached_property
    def sites(self) -> dict[str, str]:
        """By node."""
        return {node.id: node.site for node in self.cluster.nodes}

    @cached_property
    def lines(self) -> dict[tuple[str, str], float]:
        """Bytes per second by (source, destination) of sites; a line that is not there limits nothing."""
        return {(line.src, line.dst): line.bytes_per_s for line in self.cluster.site_links}

    @property
    def gates(self) -> Mapping[str, int]:
        """Variables of a program that say how often a node is there; none says that all are there once."""
        return {}

    def has_link(self, way: Way) -> bool:
        """Whether the pair may be used together."""
        return way in self.links

    def own_limit(self, way: Way) -> float:
        """Bytes per second of that pair's link; infinite where the NICs at its ends or the line decide anyway."""
        rate, nics = self.links[way].bytes_per_s, self.nics
        out, into = nics.get(way[0]), nics.get(way[1])
        shared = min(
            math.inf if out is None else out.out_bytes_per_s,
            math.inf if into is None else into.in_bytes_per_s,
            self.lines.get((self.sites[way[0]], self.sites[way[1]]), math.inf),
        )
        return rate if rate < shared else math.inf

    @cached_property
    def hub(self) -> frozenset[str]:
        """Nodes among which a pair's own link decides nothing. Chosen greedily: the oddest node goes first."""
        odd = self._odd_pairs()
        while any(odd.values()):
            worst = max(odd, key=lambda node: len(odd[node]))
            for other in odd.pop(worst):
                odd[other].discard(worst)
        return frozenset(odd)

    @cached_property
    def connected_sites(self) -> frozenset[tuple[str, str]]:
        """Pairs of sites between which there is any link; a site is connected to itself."""
        sites = self.sites
        return frozenset(
            {(sites[src], sites[dst]) for src, dst in self.links} | {(s, s) for s in sites.values()}
        )

    def _odd_pairs(self) -> dict[str, set[str]]:
        sites, connected = self.sites, self.connected_sites
        odd = {node: set[str]() for node in sites}
        for a in sites:
            for b in sites:
                if a == b or (sites[a], sites[b]) not in connected:
                    continue
                if (a, b) not in self.links or math.isfinite(self.own_limit((a, b))):
                    odd[a].add(b)
                    odd[b].add(a)
        return odd
