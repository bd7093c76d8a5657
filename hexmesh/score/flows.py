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
from typing import TypeVar

from hexmesh.cluster import Cluster
from hexmesh.score.flow_program import Limit, LimitKind, ReplicaRates, Solved, solve
from hexmesh.score.network import Network, Way
from hexmesh.score.places import Held, Place, spans_of

_End = TypeVar("_End", int, Place)

__all__ = ["FlowScore", "Held", "Limit", "LimitKind", "ReplicaRates", "best_flow", "handoff_bytes"]


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
    layers = Place(spans_of(prefill)).layers_sent(Place(spans_of(decode)))
    return {way: n_layers * layer_bytes for way, n_layers in layers.items()}


def best_flow(replicas: Sequence[ReplicaRates], cluster: Cluster | Network, layer_bytes: float) -> FlowScore:
    """The most requests that the replicas serve; `layer_bytes` is the KV of one prompt in one layer.

    Who asks often over one cluster makes its `Network` once.
    """
    if not replicas:
        return FlowScore(requests_per_s=0.0, prefill={}, decode={}, flows={}, shares={})
    network = cluster if isinstance(cluster, Network) else Network(cluster)
    known = dict[object, Place]()
    spans = [spans_of(replica.stages) for replica in replicas]
    places = [known.setdefault(one, Place(one)) for one in spans]
    solved = solve(replicas, places, network, layer_bytes)
    total = float(sum(solved.prefill.values()))
    if total <= 1e-12:
        return FlowScore(
            requests_per_s=0.0,
            prefill=dict.fromkeys((replica.name for replica in replicas), 0.0),
            decode=dict.fromkeys((replica.name for replica in replicas), 0.0),
            flows={},
            shares={},
        )
    flows = {
        (replicas[p].name, replicas[d].name): rate
        for p, d, rate in _replica_flows(solved, places, network)
        if rate > 1e-9 * total
    }
    prefill, decode = defaultdict[str, float](float), defaultdict[str, float](float)
    for (p, d), rate in flows.items():
        prefill[p] += rate
        decode[d] += rate
    return FlowScore(
        requests_per_s=total,
        prefill={replica.name: prefill[replica.name] for replica in replicas},
        decode={replica.name: decode[replica.name] for replica in replicas},
        flows=flows,
        shares=solved.shares,
    )


def _replica_flows(
    solved: Solved, places: Sequence[Place], network: Network
) -> Iterator[tuple[int, int, float]]:
    """Flows between places dealt out to their replicas: first each to itself, then in order."""
    x, y = dict(solved.prefill), dict(solved.decode)
    sources, targets = defaultdict[Place, list[int]](list), defaultdict[Place, list[int]](list)
    for at in x:
        sources[places[at]].append(at)
    for at in y:
        targets[places[at]].append(at)
    for (source, target), rate in sorted(
        _place_flows(solved, network).items(), key=lambda item: item[0][0] is not item[0][1]
    ):
        own = [at for at in sources[source] if at in y] if source is target else []
        for at in own:
            moved = min(rate, x[at], y[at])
            yield at, at, moved
            rate, x[at], y[at] = rate - moved, x[at] - moved, y[at] - moved
        yield from _dealt(sources[source], targets[target], x, y, rate)


def _place_flows(solved: Solved, network: Network) -> Mapping[tuple[Place, Place], float]:
    """All flows between places, those through the hub taken apart: between two sites any partners do."""
    flows = defaultdict[tuple[Place, Place], float](float, solved.named)
    out, into = dict(solved.out), dict(solved.into)
    for (src, dst), rate in solved.passed.items():
        senders = [place for place in out if place.hub_site(network) == src]
        takers = [place for place in into if place.hub_site(network) == dst]
        for source, target, moved in _dealt(senders, takers, out, into, rate):
            flows[source, target] += moved
    return flows


def _dealt(
    sources: Sequence[_End],
    targets: Sequence[_End],
    left: dict[_End, float],
    room: dict[_End, float],
    rate: float,
) -> Iterator[tuple[_End, _End, float]]:
    """So much from sources to targets, each as long as it lasts; what is `left` and the `room` shrink."""
    senders, takers = list(reversed(sources)), list(reversed(targets))
    while rate > 0 and senders and takers:
        source, target = senders[-1], takers[-1]
        moved = min(rate, left[source], room[target])
        if moved > 0:
            yield source, target, moved
        rate, left[source], room[target] = rate - moved, left[source] - moved, room[target] - moved
        if left[source] <= 0:
            senders.pop()
        if room[target] <= 0:
            takers.pop()
