"""The ways between hosts, with what they share: links, NICs both ways, and lines between sites.

Hidden states between stages are small and wanted soon: on each resource they go one after the other, at the rate that
the KV handoffs of the moment leave them, which is a fair share. KV is sent in bulk: what goes from one host to another
is sent one piece after the other, and the pairs of hosts that send share resources max-min fairly, less what hidden
states took of late.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from hexmesh.cluster import Cluster
from hexmesh.errors import InvalidInput
from hexmesh.sim.events import Events

ResourceKind = Literal["link", "nic_out", "nic_in", "line"]
Way = tuple[str, str]
"""From a node to another."""
LEAST_BULK = 0.1
"""Of a resource, whatever the hidden states took."""
TICK_S = 1.0
"""How often it is looked up what they took."""


@dataclass(frozen=True, slots=True)
class Resource:
    """Something that sends so much a second in all."""

    kind: ResourceKind
    name: str
    bytes_per_s: float


@dataclass(slots=True)
class _Use:
    """What a resource did; owned by `Network`."""

    free_s: float = 0.0
    """When the hidden states under way have passed."""
    n_bulk: int = 0
    """Ways that send KV through it now."""
    small_bytes: float = 0.0
    bulk_bytes: float = 0.0
    small_before: float = 0.0
    """At the last tick."""
    small_per_s: float = 0.0


@dataclass(slots=True)
class _Piece:
    left_bytes: float
    on_sent: Callable[[], None]


@dataclass(slots=True)
class _Bulk:
    """KV that waits for one way, the first piece being sent."""

    pieces: deque[_Piece] = field(default_factory=deque)
    bytes_per_s: float = 0.0
    since_s: float = 0.0
    """Up to when the first piece's bytes are counted."""
    version: int = 0
    """Of the event that ends the first piece."""


class Network:
    """Owns what is under way between hosts."""

    def __init__(self, cluster: Cluster, events: Events) -> None:
        self._events = events
        self._links = cluster.link_table()
        self._sites = {node.id: node.site for node in cluster.nodes}
        self._nics = {node.id: node.nic for node in cluster.nodes if node.nic is not None}
        self._lines = {(line.src, line.dst): line.bytes_per_s for line in cluster.site_links}
        self._ways: dict[Way, tuple[Resource, ...]] = {}
        self._uses: dict[Resource, _Use] = {}
        self._bulks: dict[Way, _Bulk] = {}
        self._sending: dict[Way, None] = {}
        self._next_tick_s = TICK_S

    @property
    def is_idle(self) -> bool:
        """Whether no KV is under way."""
        return not self._sending

    def resources(self) -> list[tuple[Resource, float, float]]:
        """Everything that was used: bytes of hidden states and of KV that it carried."""
        self._count_all()
        return [(resource, use.small_bytes, use.bulk_bytes) for resource, use in self._uses.items()]

    def delay_s(self, way: Way) -> float:
        """Half a round trip."""
        return self._link_delay_s(way)

    def send(self, way: Way, n_bytes: float) -> float:
        """Hidden states leave now; when they arrive."""
        now_s = self._events.now_s
        uses = [(resource, self._uses[resource]) for resource in self._resources_of(way)]
        start_s = max(now_s, *(use.free_s for _, use in uses))
        end_s = start_s
        for resource, use in uses:
            use.free_s = start_s + n_bytes * (1 + use.n_bulk) / resource.bytes_per_s
            use.small_bytes += n_bytes
            end_s = max(end_s, use.free_s)
        return end_s + self._link_delay_s(way)

    def send_bulk(self, way: Way, n_bytes: float, on_sent: Callable[[], None]) -> None:
        """KV is to be sent; `on_sent` is called when all of it has arrived."""
        self._resources_of(way)
        bulk = self._bulks.setdefault(way, _Bulk())
        bulk.pieces.append(_Piece(n_bytes, on_sent))
        if way not in self._sending:
            bulk.since_s = self._events.now_s
            self._change_sending(way, is_sending=True)

    def _resources_of(self, way: Way) -> tuple[Resource, ...]:
        known = self._ways.get(way)
        if known is None:
            known = self._ways[way] = tuple(self._find_resources(way))
            for resource in known:
                self._uses.setdefault(resource, _Use())
        return known

    def _find_resources(self, way: Way) -> Iterable[Resource]:
        src, dst = way
        if way not in self._links:
            raise InvalidInput(f"no link from {src} to {dst}", next_step="lay the plan out without it")
        yield Resource("link", f"{src} to {dst}", self._links[way].bytes_per_s)
        if src in self._nics:
            yield Resource("nic_out", src, self._nics[src].out_bytes_per_s)
        if dst in self._nics:
            yield Resource("nic_in", dst, self._nics[dst].in_bytes_per_s)
        sites = self._sites[src], self._sites[dst]
        if sites in self._lines:
            yield Resource("line", f"{sites[0]} to {sites[1]}", self._lines[sites])

    def _link_delay_s(self, way: Way) -> float:
        return self._links[way].rtt_p50_s / 2

    # --- KV ---

    def _change_sending(self, way: Way, *, is_sending: bool) -> None:
        self._count_all()
        for resource in self._ways[way]:
            self._uses[resource].n_bulk += 1 if is_sending else -1
        if is_sending:
            self._sending[way] = None
        else:
            del self._sending[way]
        self._look_at_small()
        self._share()

    def _share(self) -> None:
        """Give every way that sends its rate, and plan the end of its first piece."""
        rates = fair_rates({way: self._ways[way] for way in self._sending}, self._room())
        for way, rate in rates.items():
            self._bulks[way].bytes_per_s = rate
            self._plan_end(way)

    def _room(self) -> dict[Resource, float]:
        return {
            resource: max(LEAST_BULK * resource.bytes_per_s, resource.bytes_per_s - use.small_per_s)
            for resource, use in self._uses.items()
            if use.n_bulk
        }

    def _plan_end(self, way: Way) -> None:
        bulk = self._bulks[way]
        bulk.version += 1
        end_s = self._events.now_s + bulk.pieces[0].left_bytes / bulk.bytes_per_s
        self._events.at(end_s, self._end_piece, way, bulk.version)

    def _end_piece(self, way: Way, version: int) -> None:
        bulk = self._bulks[way]
        if version != bulk.version:
            return  # the rates changed since
        self._count(way, bulk)
        piece = bulk.pieces.popleft()
        self._carry(way, piece.left_bytes)  # what rounding left over
        self._events.at(self._events.now_s + self._link_delay_s(way), piece.on_sent)
        if bulk.pieces:
            self._plan_end(way)
        else:
            bulk.version += 1
            self._change_sending(way, is_sending=False)

    def _count_all(self) -> None:
        for way in self._sending:
            self._count(way, self._bulks[way])

    def _count(self, way: Way, bulk: _Bulk) -> None:
        """Take off what the first piece has sent since it was last looked at."""
        now_s = self._events.now_s
        if not bulk.pieces:
            return
        piece = bulk.pieces[0]
        n_bytes = min(piece.left_bytes, (now_s - bulk.since_s) * bulk.bytes_per_s)
        bulk.since_s = now_s
        piece.left_bytes -= n_bytes
        self._carry(way, n_bytes)

    def _carry(self, way: Way, n_bytes: float) -> None:
        for resource in self._ways[way]:
            self._uses[resource].bulk_bytes += n_bytes

    def _look_at_small(self) -> None:
        now_s = self._events.now_s
        if now_s < self._next_tick_s:
            return
        seconds = now_s - self._next_tick_s + TICK_S
        for use in self._uses.values():
            use.small_per_s = (use.small_bytes - use.small_before) / seconds
            use.small_before = use.small_bytes
        self._next_tick_s = now_s + TICK_S


def fair_rates(ways: Mapping[Way, Iterable[Resource]], room: Mapping[Resource, float]) -> dict[Way, float]:
    """Max-min fair: no way could have more without one that has no more than it getting less."""
    left = dict(room)
    users: dict[Resource, list[Way]] = {resource: [] for resource in left}
    for way, resources in ways.items():
        for resource in resources:
            users[resource].append(way)
    rates: dict[Way, float] = {}
    while len(rates) < len(ways):
        share, tightest = math.inf, None
        for resource, among in users.items():
            n = sum(way not in rates for way in among)
            if n and left[resource] / n < share:
                share, tightest = left[resource] / n, resource
        assert tightest is not None
        for way in users[tightest]:
            if way in rates:
                continue
            rates[way] = share
            for resource in ways[way]:
                left[resource] = max(0.0, left[resource] - share)
    return rates
