"""Replicas by the place of their layers: those that hold every layer on the same hosts can stand in for each other.

Between them nothing crosses a wire, and to everybody else they send the same bytes: the flow program counts places,
not replicas.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from hexmesh.score.network import Network, Way


class Held(Protocol):
    """Layers [start, stop) that a node holds, such as a stage."""

    @property
    def node(self) -> str: ...
    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...


Spans = tuple[tuple[str, int, int], ...]
"""(node, start, stop) from the first to the last layer, neighbours on one node put together."""


def spans_of(stages: Sequence[Held]) -> Spans:
    """Which node holds which layers."""
    spans = list[tuple[str, int, int]]()
    for stage in sorted(stages, key=lambda stage: stage.start):
        if spans and spans[-1][0] == stage.node and spans[-1][2] == stage.start:
            spans[-1] = (stage.node, spans[-1][1], stage.stop)
        else:
            spans.append((stage.node, stage.start, stage.stop))
    return tuple(spans)


@dataclass(frozen=True, eq=False)
class Place:
    """Where a replica's layers are. Each is one object, and equal to no other."""

    spans: Spans

    @cached_property
    def layers(self) -> Mapping[str, int]:
        """How many each node holds."""
        counts = defaultdict[str, int](int)
        for node, start, stop in self.spans:
            counts[node] += stop - start
        return dict(counts)

    def hub_site(self, network: Network) -> str | None:
        """The site that it is in, if it is in one and only NICs and lines limit it."""
        sites = {network.sites[node] for node in self.layers}
        return next(iter(sites)) if len(sites) == 1 and network.hub.issuperset(self.layers) else None

    def layers_sent(self, other: Place) -> Mapping[Way, int]:
        """Layers whose KV goes from a node to another one when the other place decodes."""
        ways = defaultdict[Way, int](int)
        for src, start, stop in self.spans:
            for dst, other_start, other_stop in other.spans:
                n_layers = min(stop, other_stop) - max(start, other_start)
                if n_layers > 0 and src != dst:
                    ways[src, dst] += n_layers
        return dict(ways)


def pairs_of(
    sources: Sequence[Place], targets: Sequence[Place], network: Network
) -> Iterator[tuple[Place, Place, Mapping[Way, int]]]:
    """Pairs of places that the flow program must name, with what they send: all that a hub does not speak for.

    A hub speaks for two places that share no node; those that do may keep layers where they are. In a coarse network
    it speaks for these, too, as if nothing stayed, unless all does.
    """
    by_node = defaultdict[str, list[Place]](list)
    outside = [place for place in targets if place.hub_site(network) is None]
    for place in targets:
        for node in place.layers:
            by_node[node].append(place)
    for source in sources:
        if source.hub_site(network) is None:
            others: Sequence[Place] = targets
        else:
            near = {other: None for node in source.layers for other in by_node[node]}
            others = list(near | dict.fromkeys(outside))
        for target in others:
            ways = source.layers_sent(target)
            if ways and network.is_coarse:
                continue
            if all(network.has_link(way) for way in ways):
                yield source, target, ways
