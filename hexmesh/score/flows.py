"""The most requests that replicas serve together, and what stops them: a linear program over rates and KV handoffs.

x_r and y_r are prompts and outputs a second at replica r; f_pd requests that p prefills and d decodes.

    maximise the sum of f
    sum over d of f_pd = x_p        sum over p of f_pd = y_d
    prefill   x <= P, y = 0         decode   y <= D, x = 0
    mixed     x times a prompt's seconds + y times an output's <= 1 for every stage, hop and the round trip
    every NIC out, NIC in, line between sites and link:  sum of f_pd x KV bytes of p to d that cross it <= bytes/s

KV of a layer goes from whoever holds the layer in p to whoever holds it in d; inside a host it crosses nothing, and a
replica hands over to itself for nothing. After HexGen-2 (flow network); differs: NICs and lines are shared by all
pairs, which a network of replicas cannot say, and replicas may do both.

All limits are homogeneous, so the shadow price of each times its limit is its share of the result, and the shares sum
to one: the largest names the bottleneck.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import csr_matrix

from hexmesh.cluster import Cluster, Role

LimitKind = Literal["prefill", "decode", "mixed", "nic_out", "nic_in", "line", "link"]
Way = tuple[str, str]
"""From a node to a node."""


class Held(Protocol):
    """Layers [start, stop) that a node holds, such as a stage."""

    @property
    def node(self) -> str: ...
    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaRates:
    """What one replica does at most, in requests per second."""

    name: str
    role: Role
    prefill: float
    decode: float
    stages: tuple[Held, ...]
    uses: tuple[tuple[float, float], ...] = ()
    """As in `Mixed`, for "mixed"."""


@dataclass(frozen=True, slots=True)
class Limit:
    """Something that is used up. A mixed replica's parts are numbered: its stages, its hops, the round trip."""

    kind: LimitKind
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowScore:
    """The best steady state of some replicas."""

    requests_per_s: float
    prefill: Mapping[str, float]
    decode: Mapping[str, float]
    """Rates by replica."""
    flows: Mapping[tuple[str, str], float]
    """Requests per second by (prefill, decode) replica, zeros left out."""
    shares: Mapping[Limit, float]
    """How much of the result each limit decides; they sum to one. Zeros left out."""

    @property
    def bottleneck(self) -> Limit | None:
        """The limit that decides most; None where nothing is served."""
        return max(self.shares, key=self.shares.__getitem__, default=None)


def handoff_bytes(prefill: Sequence[Held], decode: Sequence[Held], layer_bytes: float) -> dict[Way, float]:
    """Bytes of one request's KV by way between two hosts, `layer_bytes` for each layer."""
    ways = defaultdict[Way, float](float)
    for a in prefill:
        for b in decode:
            n_layers = min(a.stop, b.stop) - max(a.start, b.start)
            if n_layers > 0 and a.node != b.node:
                ways[a.node, b.node] += n_layers * layer_bytes
    return dict(ways)


def best_flow(replicas: Sequence[ReplicaRates], cluster: Cluster, layer_bytes: float) -> FlowScore:
    """The most requests that the replicas serve; `layer_bytes` is the KV of one prompt in one layer."""
    pairs = list(_pairs(replicas, cluster, layer_bytes))
    if not pairs:
        return _score(replicas, pairs, [], 0.0, {})
    limits, sites = _limits(replicas, cluster), {node.id: node.site for node in cluster.nodes}
    rows, uses = dict[Limit, int](), defaultdict[tuple[int, int], float](float)
    for at, (p, d, ways) in enumerate(pairs):
        for limit, use in _uses(replicas[p], replicas[d], ways, sites):
            if limit in limits:
                uses[rows.setdefault(limit, len(rows)), at] += use
    most = np.array([limits[limit] for limit in rows])
    scale = np.where(most > 0, most, 1.0)
    at_row, at_pair = np.array(list(uses)).T
    shares = csr_matrix((np.array(list(uses.values())) / scale[at_row], (at_row, at_pair)))
    found = linprog(-np.ones(len(pairs)), A_ub=shares, b_ub=most / scale, method="highs")
    assert found.success, found.message
    total = float(-found.fun)
    prices = -found.ineqlin.marginals * (most / scale) / (total or 1.0)
    return _score(replicas, pairs, found.x, total, dict(zip(rows, prices, strict=True)))


def _score(
    replicas: Sequence[ReplicaRates],
    pairs: Sequence[tuple[int, int, Mapping[Way, float]]],
    rates: Sequence[float],
    total: float,
    shares: Mapping[Limit, float],
) -> FlowScore:
    flows = {
        (replicas[p].name, replicas[d].name): float(rate)
        for (p, d, _), rate in zip(pairs, rates, strict=True)
        if rate > 1e-9 * max(total, 1e-30)
    }
    names = [replica.name for replica in replicas]
    return FlowScore(
        requests_per_s=total,
        prefill={name: sum(rate for (p, _), rate in flows.items() if p == name) for name in names},
        decode={name: sum(rate for (_, d), rate in flows.items() if d == name) for name in names},
        flows=flows,
        shares={limit: float(share) for limit, share in shares.items() if share > 1e-9} if total > 0 else {},
    )


def _pairs(
    replicas: Sequence[ReplicaRates], cluster: Cluster, layer_bytes: float
) -> Iterator[tuple[int, int, Mapping[Way, float]]]:
    """Pairs of replicas that may hand over, with the bytes that a request sends: none over a missing link."""
    links = cluster.link_table()
    for p, source in enumerate(replicas):
        for d, target in enumerate(replicas):
            if source.role == "decode" or target.role == "prefill" or (p == d and source.role != "mixed"):
                continue
            ways = handoff_bytes(source.stages, target.stages, layer_bytes)
            if all(way in links for way in ways):
                yield p, d, ways


def _uses(
    source: ReplicaRates, target: ReplicaRates, ways: Mapping[Way, float], sites: Mapping[str, str]
) -> Iterator[tuple[Limit, float]]:
    """What one request a second of that pair takes of each limit."""
    yield from _rate_uses(source, 1.0, 0.0)
    yield from _rate_uses(target, 0.0, 1.0)
    for (src, dst), n_bytes in ways.items():
        yield Limit("nic_out", src), n_bytes
        yield Limit("nic_in", dst), n_bytes
        yield Limit("link", f"{src} to {dst}"), n_bytes
        if sites[src] != sites[dst]:
            yield Limit("line", f"{sites[src]} to {sites[dst]}"), n_bytes


def _rate_uses(replica: ReplicaRates, prompts: float, outputs: float) -> Iterator[tuple[Limit, float]]:
    """Of the replica's own rates."""
    if prompts:
        yield Limit("prefill", replica.name), prompts
    if outputs:
        yield Limit("decode", replica.name), outputs
    for part, (prompt_s, output_s) in enumerate(replica.uses):
        yield Limit("mixed", f"{replica.name}/{part}"), prompts * prompt_s + outputs * output_s


def _limits(replicas: Sequence[ReplicaRates], cluster: Cluster) -> Mapping[Limit, float]:
    """How much there is of everything that is known, links left out that their ends' NICs limit anyway."""
    limits = dict[Limit, float]()
    for replica in replicas:
        limits[Limit("prefill", replica.name)] = replica.prefill
        limits[Limit("decode", replica.name)] = replica.decode
        for part in range(len(replica.uses)):
            limits[Limit("mixed", f"{replica.name}/{part}")] = 1.0
    nics = {node.id: node.nic for node in cluster.nodes if node.nic is not None}
    for node_id, nic in nics.items():
        limits[Limit("nic_out", node_id)] = nic.out_bytes_per_s
        limits[Limit("nic_in", node_id)] = nic.in_bytes_per_s
    for link in cluster.links:
        out, into = nics.get(link.src), nics.get(link.dst)
        is_slower_than_out = out is None or link.bytes_per_s < out.out_bytes_per_s
        if is_slower_than_out and (into is None or link.bytes_per_s < into.in_bytes_per_s):
            limits[Limit("link", f"{link.src} to {link.dst}")] = link.bytes_per_s
    for line in cluster.site_links:
        limits[Limit("line", f"{line.src} to {line.dst}")] = line.bytes_per_s
    return limits
